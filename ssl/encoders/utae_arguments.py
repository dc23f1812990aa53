"""The arguments of U-TAE, checked one by one and against each other before anything is built."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from bocage.shards.errors import InputError

Aggregation = Literal["att_group", "att_mean", "mean"]
Normalization = Literal["group", "batch", "instance", "none"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

GROUPS = 4
"""Of the frame encoder's group normalisation, as in the official code."""

_LARGEST = 1 << 20  # nothing of a network that works comes near
_CHOICES = {"agg_mode": Aggregation, "encoder_norm": Normalization, "padding_mode": PaddingMode}
_COUNTS = {"input_dim": 1, "str_conv_k": 1, "str_conv_s": 1, "str_conv_p": 0, "n_head": 1, "d_model": 1, "d_k": 1}
_WIDTHS = ("encoder_widths", "decoder_widths", "out_conv")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Check the arguments of ``UTAE``, by name.

    Raises:
        InputError: one of a wrong type or range, or two at odds; the message names the first.
    """
    for key, choices in _CHOICES.items():
        _require(given, key, given[key] in get_args(choices), f"one of {', '.join(get_args(choices))}")
    for key, least in _COUNTS.items():
        _require(given, key, _is_count(given[key], least), f"a whole number from {least} to {_LARGEST}")
    for key in _WIDTHS:
        fine = isinstance(given[key], Sequence) and all(_is_count(width, 1) for width in given[key])
        _require(given, key, fine, f"a list of whole numbers from 1 to {_LARGEST}")
    for key in ("masked_norm", "head"):
        _require(given, key, isinstance(given[key], bool), "true or false")
    fine = type(given["pad_value"]) in (int, float) and abs(given["pad_value"]) <= _LARGEST
    _require(given, "pad_value", fine, f"a number from -{_LARGEST} to {_LARGEST}")
    _check_together(given)


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and least <= value <= _LARGEST  # True is an int as well, but not a number of anything


def _require(given: Mapping[str, Any], key: str, fine: bool, expected: str) -> None:
    if not fine:
        raise InputError(f"U-TAE: {key} = {reprlib.repr(given[key])} is not {expected}")


def _check_together(given: Mapping[str, Any]) -> None:
    encoder_widths, decoder_widths = list(given["encoder_widths"]), list(given["decoder_widths"])
    if not encoder_widths or len(encoder_widths) != len(decoder_widths) or encoder_widths[-1] != decoder_widths[-1]:
        raise InputError(
            f"U-TAE: encoder_widths {reprlib.repr(encoder_widths)} and decoder_widths {reprlib.repr(decoder_widths)} "
            "must have one length and one last value"
        )
    if given["head"] and not given["out_conv"]:
        raise InputError("U-TAE: out_conv is empty; its last value must be the number of classes")
    n_head = given["n_head"]
    for divisor, used, what in (
        (n_head, given["agg_mode"] == "att_group", f"n_head = {n_head} under agg_mode att_group"),
        (GROUPS, given["encoder_norm"] == "group", f"{GROUPS} under encoder_norm group"),
    ):
        for width in encoder_widths if used else ():
            if width % divisor:
                raise InputError(f"U-TAE: encoder_widths holds {width}, which must be a multiple of {what}")
    for key, width in (("encoder_widths[-1]", encoder_widths[-1]), ("d_model", given["d_model"])):
        if width % n_head:
            raise InputError(f"U-TAE: {key} = {width} is not a multiple of n_head = {n_head}")
