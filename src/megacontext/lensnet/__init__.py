"""LensNet: says where detail is worth its cost (pure torch)."""

from megacontext.lensnet.config import LensNetConfig
from megacontext.lensnet.dataloader import SnapshotBatch, SnapshotLoader, collate
from megacontext.lensnet.features import FEATURE_NAMES, N_FEATURES, SpanFacts, span_features
from megacontext.lensnet.inputs import CacheFeatures, EntryFeatures, Scores, TailStates
from megacontext.lensnet.keys import relevance
from megacontext.lensnet.legality import Legality, entry_legality, mask_scores
from megacontext.lensnet.model import LensNet
from megacontext.lensnet.snapshots import Snapshot, SnapshotDataset, write_snapshots

__all__ = [
    "FEATURE_NAMES",
    "N_FEATURES",
    "CacheFeatures",
    "EntryFeatures",
    "Legality",
    "LensNet",
    "LensNetConfig",
    "Scores",
    "Snapshot",
    "SnapshotBatch",
    "SnapshotDataset",
    "SnapshotLoader",
    "SpanFacts",
    "TailStates",
    "collate",
    "entry_legality",
    "mask_scores",
    "relevance",
    "span_features",
    "write_snapshots",
]
