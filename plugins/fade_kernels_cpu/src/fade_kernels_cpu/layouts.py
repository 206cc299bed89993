"""What ``native/attention.h`` declares, field by field, for ctypes."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p


class Side(Structure):
    """``FadeSide``: codes of keys or of values of one tier."""

    _fields_ = (
        ("codes", c_void_p * 2),
        ("meta", c_void_p),
        ("levels", c_void_p),
        ("widths", c_int32 * 2),
        ("planes", c_int32),
        ("tile", c_int32),
        ("dim", c_int32),
        ("group", c_int32),
        ("by_token", c_int32),
        ("per_channel", c_int32),
    )


class Runs(Structure):
    """``FadeRuns``: codes of channels of many widths."""

    _fields_ = (
        ("codes", c_void_p),
        ("gain", c_void_p),
        ("blocks", c_void_p),
        ("widths", c_void_p),
        ("levels", c_void_p),
        ("gains", c_void_p),
        ("count", c_int32),
        ("row", c_int32),
        ("kept", c_int32),
    )


class Full(Structure):
    """``FadeFull``: tokens in full precision."""

    _fields_ = (
        ("data", c_void_p),
        ("stride_row", c_int64),
        ("stride_head", c_int64),
        ("stride_token", c_int64),
        ("dtype", c_int32),
    )


class Segment(Structure):
    """``FadeSegment``: one packed tier, or the window."""

    _fields_ = (
        ("keys", Side),
        ("values", Side),
        ("key_runs", Runs),
        ("value_runs", Runs),
        ("full_keys", Full),
        ("full_values", Full),
        ("table", c_void_p),
        ("used", c_void_p),
        ("counts", c_void_p),
        ("lengths", c_void_p),
        ("query", c_void_p),
        ("bias", c_void_p),
        ("mask", c_void_p),
        ("mask_row", c_int64),
        ("mask_head", c_int64),
        ("mask_query", c_int64),
        ("mask_slot", c_int64),
        ("output", c_void_p),
        ("mass", c_void_p),
        ("probabilities", c_void_p),
        ("slots", c_int64),
        ("table_width", c_int64),
        ("packed", c_int32),
        ("causal", c_int32),
        ("key_dim", c_int32),
        ("value_dim", c_int32),
    )


class Call(Structure):
    """``FadeCall``: one call over all segments."""

    _fields_ = (
        ("segment", POINTER(Segment)),
        ("sinks", c_void_p),
        ("lse", c_void_p),
        ("rows", c_int64),
        ("heads", c_int64),
        ("segments", c_int32),
        ("count", c_int32),
        ("padded", c_int32),
        ("queries", c_int32),
        ("softcap", c_float),
        ("threads", c_int32),
    )


SIZED: tuple[type[Structure], ...] = (Side, Runs, Full, Segment, Call)
"""In the order in which ``fade_sizes`` knows them."""
