"""Foresight alignment: neighbours, heads, teachers, schedules and the objective that joins them to the model."""

from mirai_ds.foresight.desynchronised import DesynchronisedTeacher
from mirai_ds.foresight.encoders import EncoderTeacher, encoder_input, untrained_encoder
from mirai_ds.foresight.methods import METHODS, method_of
from mirai_ds.foresight.multi_token import TokenTeacher
from mirai_ds.foresight.neighbours import decoded_targets, index_table, offsets, seam_notes, slot_counts
from mirai_ds.foresight.objective import MiraiObjective
from mirai_ds.foresight.schedule import alignment_active, alignment_multiplier, heads_alone, ramping
from mirai_ds.foresight.teachers import EmaTeacher, Teacher

__all__ = [
    "METHODS",
    "DesynchronisedTeacher",
    "EmaTeacher",
    "EncoderTeacher",
    "MiraiObjective",
    "Teacher",
    "TokenTeacher",
    "alignment_active",
    "alignment_multiplier",
    "decoded_targets",
    "encoder_input",
    "heads_alone",
    "index_table",
    "method_of",
    "offsets",
    "ramping",
    "seam_notes",
    "slot_counts",
    "untrained_encoder",
]
