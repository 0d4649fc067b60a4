"""The exceptions VCache raises on purpose.

Only construction and bad arguments raise (bad arguments as plain ``ValueError``, naming the argument). A pool, server or
store that fails while serving is a miss and a counter, never one of these in a caller's forward pass.
"""


class VCacheError(Exception):
    """Base of everything VCache raises on purpose."""


class ConfigError(VCacheError, ValueError):
    """A setting is unknown, badly formed or contradicts another; names the field, the value and what would work."""


class ProtocolError(VCacheError):
    """A message could not be understood, or a peer speaks another protocol version."""


class CapacityError(VCacheError):
    """More memory was asked for than there is; names both numbers in bytes."""


class UnavailableError(VCacheError):
    """A server, donor or segment that is needed cannot be reached within its deadline."""


class CorruptionError(VCacheError):
    """Memory or a message does not hold what its header or checksum promises."""
