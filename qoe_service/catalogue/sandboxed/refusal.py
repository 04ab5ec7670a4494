"""Why a model, a data set or a pass is not used."""


class Refusal(Exception):
    """One sentence for the operator who handed it in."""
