"""The sub-commands of ``bocage``, one thin module each."""
