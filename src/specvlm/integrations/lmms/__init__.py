"""specvlm as a model of lmms-eval: what the entry point in the group `lmms_eval.models` names.

lmms-eval calls it for every model it lists, so it imports nothing heavy; `model` is imported when it is chosen.
"""

from typing import Any


def manifest() -> Any:
    """Return lmms-eval's ModelManifest of `--model specvlm`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="specvlm", chat_class_path="specvlm.integrations.lmms.model.LmmsModel")
