"""Channel dynamics: which channels of a network die while it trains, when and where, and what may be done about it."""

from rqvae.callbacks.channels.classifier import Region
from rqvae.callbacks.channels.tracker import ChannelTracker

__all__ = ["ChannelTracker", "Region"]
