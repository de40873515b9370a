"""Stands in for a module of settings that any config class must take."""

config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "a label"},
    "label2id": {"a label": "0"},
    "problem_type": "regression",
}
