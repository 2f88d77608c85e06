"""Other libraries' caches as settings of a pipeline, so that an evaluation measures them beside ours.

Each is put on as its own documentation says, with its own defaults. What a user would have to do beside that is done
here: a cache context around each denoiser call, its state cleared before each picture, its random numbers seeded. And
whatever it did to the pipeline is undone: none of them undoes all of it.
"""

from .applying import applied
from .base import PEERS, PeerConfig, make_peer, parse_peer, peer_from_dict
from .hooks import DiffusersFirstBlock, DiffusersMagCache, DiffusersTaylorSeer
from .packages import CacheDiT, PeerDeepCache, ToMeSD
from .tgate import PeerTGate

__all__ = [
    "PEERS",
    "CacheDiT",
    "DiffusersFirstBlock",
    "DiffusersMagCache",
    "DiffusersTaylorSeer",
    "PeerConfig",
    "PeerDeepCache",
    "PeerTGate",
    "ToMeSD",
    "applied",
    "make_peer",
    "parse_peer",
    "peer_from_dict",
]
