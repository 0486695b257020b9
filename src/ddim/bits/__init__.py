"""Bits per dimension of pictures or per token of text, in a folder that a killed run goes on with."""

from ddim.bits.measure import Block, measure, summary
from ddim.bits.request import Request, bound_request, default_last_sigma, ode_request, token_request

__all__ = [
    "Block",
    "Request",
    "bound_request",
    "default_last_sigma",
    "measure",
    "ode_request",
    "summary",
    "token_request",
]
