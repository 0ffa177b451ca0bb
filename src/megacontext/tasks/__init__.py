"""Generated texts with questions: planted facts and small simulated worlds, from one vocabulary."""

from megacontext.tasks.documents import QUESTION_TEMPLATE, Piece, Question, Theme
from megacontext.tasks.fact_themes import FactThemes
from megacontext.tasks.planting import PlantedFact, plant
from megacontext.tasks.recall_documents import Prose, RecallDocuments
from megacontext.tasks.story_world import STORY_KINDS, StoryWorld
from megacontext.tasks.synonym_themes import SynonymThemes
from megacontext.tasks.vocabulary import Split, Vocabulary

__all__ = [
    "QUESTION_TEMPLATE",
    "STORY_KINDS",
    "FactThemes",
    "Piece",
    "PlantedFact",
    "Prose",
    "Question",
    "RecallDocuments",
    "Split",
    "StoryWorld",
    "SynonymThemes",
    "Theme",
    "Vocabulary",
    "plant",
]
