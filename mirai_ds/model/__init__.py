"""Single-device maths, torch only: the GPT, its positions, dropout, initial weights, and sampling."""

from mirai_ds.model.features import token_features
from mirai_ds.model.gpt import GPT, GPTOutput, GPTTrunk, gpt_from_weights, next_token_loss
from mirai_ds.model.init import initial_value, initialise
from mirai_ds.model.sampling import Decoder, SamplingRules, Speed, sample_tokens

__all__ = [
    "GPT",
    "Decoder",
    "GPTOutput",
    "GPTTrunk",
    "SamplingRules",
    "Speed",
    "gpt_from_weights",
    "initial_value",
    "initialise",
    "next_token_loss",
    "sample_tokens",
    "token_features",
]
