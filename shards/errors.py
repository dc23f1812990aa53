"""The exception for wrong user input, which commands print without a traceback."""


class InputError(ValueError):
    """A value, file or key from the user cannot be used.

    The message is one sentence that names the file, key or value, and what to do. Commands print it and exit with
    status 2. Any other exception is an internal error and keeps its traceback.
    """
