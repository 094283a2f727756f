"""Experiments that are small: a file that names an empty module, and overrides for those on models of several kinds."""

from pathlib import Path

SMALL = {
    # two layers with a window, one without, and both again; contexts fill the windows
    "gemma": (
        "model.config_overrides={num_hidden_layers: 6, hidden_size: 64, intermediate_size: 160, head_dim: 32, "
        "num_attention_heads: 4, num_key_value_heads: 2, vocab_size: 2000, sliding_window: 32, sliding_window_pattern: 3}",
        "scenarios.decode-b1.context=40",
        "scenarios.decode-b16.context=40",
        "scenarios.prefill-1x2048.length=64",
    ),
    "vit": (
        "model.config={num_labels: 5, num_hidden_layers: 1, hidden_size: 32, num_attention_heads: 2, intermediate_size: 64}",
    ),
    "chronos2": (
        "model.config.num_layers=1",
        "model.config.d_model=32",
        "model.config.d_kv=16",
        "model.config.d_ff=64",
        "model.config.num_heads=2",
    ),
    "zimage": (
        "model.arguments={dim: 32, n_layers: 1, n_refiner_layers: 1, n_heads: 2, n_kv_heads: 2, cap_feat_dim: 16, "
        "axes_dims: [4, 6, 6], axes_lens: [64, 16, 16]}",
        "scenarios.1024x1024.inputs.x=[{shape: [16, 1, 16, 16]}]",
        "scenarios.1024x1024.inputs.cap_feats=[{shape: [32, 16]}]",
    ),
}
NEEDS = {"chronos2": "chronos", "zimage": "diffusers"}  # packages


def written(folder: Path, text: str) -> Path:
    """An experiment's file, and the module `model.py` beside it, of which nothing is called."""
    (folder / "model.py").write_text("")
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path
