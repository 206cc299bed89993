"""Attention over FADE's packed KV cache on a CPU, in C++ that is compiled for the machine when it is first used."""
