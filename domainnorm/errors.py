"""What a user did wrong, told apart from what we did wrong."""


class UserError(ValueError):
    """A mistake in what the user gave (config, data, checkpoint), told in one line that says what to do.

    The command line prints it and exits with code 2.

    Example::

        >>> dn.load_config(None, ["SOLVER.BSE_LR", 0.1])
        Traceback (most recent call last):
        domainnorm.errors.UserError: overrides: unknown key SOLVER.BSE_LR; the nearest known key is SOLVER.BASE_LR
    """
