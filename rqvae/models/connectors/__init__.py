"""Connectors between Stage1's latent and Stage2's."""

from rqvae.models.connectors.reshape import ReshapeConnector
from rqvae.models.connectors.scale_shift import ScaleShift
from rqvae.models.connectors.statistics import ChannelStatistics, channel_statistics
from rqvae.models.interfaces import base_connector

__all__ = ["ChannelStatistics", "ReshapeConnector", "ScaleShift", "base_connector", "channel_statistics"]
