"""Where the packages lie: three folders beside the library are packaged under its name. All else: pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {
    "ditmem_jax.configs": "configs",
    "ditmem_jax.convert": "convert",
    "ditmem_jax.tiny_weights": "experiments/tiny_wan/weights",
}

packages = find_packages(include=["ditmem_jax", "ditmem_jax.*"])
for name, folder in FOLDERS.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]
setup(packages=packages, package_dir=FOLDERS)
