"""The one exception for wrong user input: command lines print its sentence and exit without a traceback."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one clear sentence that names the file, key or value and what to do about it. Command lines print
    it and exit with status 2; every other exception is an internal fault and keeps its traceback.
    """
