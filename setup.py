from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


ROOT = Path(__file__).parent
NAME = "modeling_baichuan_audio"
# One import name. These folders lie beside the package in the repository and inside it once installed.
# The last one is data: the trained miniature checkpoint.
PARTS = ["processors", "conversion", "training", "training.miniature", "evaluation", "miniature"]
EVAL = ["rapidfuzz>=3"]
PLOT = ["matplotlib>=3.8"]
QUANTIZE = ["bitsandbytes>=0.46.1", "torchao>=0.14"]
TEST = [
    *EVAL,
    *PLOT,
    *QUANTIZE,
    "pytest>=8",
    "hypothesis>=6",
    "parameterized>=0.9",
    "ruff>=0.14",
    "codespell>=2.4",
    "pre-commit>=4",
]


class BuildWithCard(build_py):
    """Puts the model card into the package: cards of saved checkpoints are made from it."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file(str(ROOT / "model_card.md"), str(Path(self.build_lib) / NAME / "model_card.md"))


setup(
    name="baichuan-audio",
    version="0.1.0",
    description="Baichuan-Audio, an end-to-end speech language model, for transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[NAME, *(f"{NAME}.{part}" for part in PARTS)],
    package_dir={NAME: NAME, **{f"{NAME}.{part}": part.replace(".", "/") for part in PARTS}},
    cmdclass={"build_py": BuildWithCard},
    package_data={
        f"{NAME}.training": ["recipes/*.yaml", "recipes/*/*.yaml", "miniature/*.xz"],
        f"{NAME}.evaluation": ["judges.txt"],
        f"{NAME}.miniature": ["*.json", "*.jinja", "*.safetensors"],
    },
    install_requires=[
        "transformers>=5.20,<5.24",  # 5.24 renames `past_key_values` in what models are given and return
        "torch>=2.6",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "jinja2>=3.1",
        "numpy>=1.26",
        "pyyaml>=6",
        "soundfile>=0.12",
        "soxr>=0.5",
        "tqdm>=4.66",
        "typer>=0.12",
    ],
    extras_require={
        "train": ["accelerate>=1.1", "datasets>=3.0", "peft>=0.18", "praat-parselmouth>=0.4.5", "tensorboard>=2.16"],
        "eval": EVAL,
        "plot": PLOT,
        "quantize": QUANTIZE,
        "test": TEST,
        "demo": ["gradio>=5"],
    },
    entry_points={"console_scripts": ["baichuan-audio=modeling_baichuan_audio.cli:app"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
