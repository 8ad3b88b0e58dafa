"""Modules that `tests.processes` imports before it forks."""

import contextlib

import accelerate  # noqa: F401
import accelerate.checkpointing  # noqa: F401
import timm  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401

import vlp.cli  # noqa: F401
import vlp.loading.run  # noqa: F401
import vlp.models.dual  # noqa: F401
import vlp.tasks.probe  # noqa: F401
import vlp.tasks.retrieval  # noqa: F401
import vlp.tasks.sentence_similarity  # noqa: F401
import vlp.tasks.zero_shot  # noqa: F401
import vlp.testing  # noqa: F401
import vlp.train  # noqa: F401

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401
