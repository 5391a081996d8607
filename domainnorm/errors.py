"""What a user did wrong, told apart from what we did wrong."""


class UserError(ValueError):
    """A mistake in what the user gave (config, data, checkpoint): one line that says what to do. Exit code 2."""
