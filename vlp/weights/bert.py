"""Parameter names of a BERT layer with cross-attention: transformers' and those of `vlp.encoders.fusion_layer`."""

BERT_LAYER = {
    **{f"attention.self.{name}": f"self_attention.{name}" for name in ("query", "key", "value")},
    "attention.output.dense": "self_attention.out",
    "attention.output.LayerNorm": "self_norm",
    **{f"crossattention.self.{name}": f"cross_attention.{name}" for name in ("query", "key", "value")},
    "crossattention.output.dense": "cross_attention.out",
    "crossattention.output.LayerNorm": "cross_norm",
    "intermediate.dense": "expand",
    "output.dense": "contract",
    "output.LayerNorm": "norm",
}
