"""Configuration: types and checks, presets by name, files and command lines that set values."""

from ditmem_jax.config.networks import AdapterConfig as AdapterConfig
from ditmem_jax.config.networks import CLIPConfig as CLIPConfig
from ditmem_jax.config.networks import DiTConfig as DiTConfig
from ditmem_jax.config.networks import EncoderConfig as EncoderConfig
from ditmem_jax.config.networks import ExpertsConfig as ExpertsConfig
from ditmem_jax.config.networks import FreeTokensConfig as FreeTokensConfig
from ditmem_jax.config.networks import MemoryConfig as MemoryConfig
from ditmem_jax.config.networks import UMT5Config as UMT5Config
from ditmem_jax.config.networks import VAEConfig as VAEConfig
from ditmem_jax.config.schema import Config as Config
from ditmem_jax.config.schema import DataConfig as DataConfig
from ditmem_jax.config.schema import MeshConfig as MeshConfig
from ditmem_jax.config.schema import ObjectiveConfig as ObjectiveConfig
from ditmem_jax.config.schema import OptimConfig as OptimConfig
from ditmem_jax.config.schema import RunConfig as RunConfig
from ditmem_jax.config.schema import SampleConfig as SampleConfig
from ditmem_jax.config.schema import VideoConfig as VideoConfig
from ditmem_jax.config.schema import WeightsConfig as WeightsConfig
from ditmem_jax.config.strict import build as build
from ditmem_jax.config.strict import to_dict as to_dict
