"""The formula, and the backends that compute it."""
