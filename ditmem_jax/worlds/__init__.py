"""Physics with known answers: made-up planets, simulated, rendered, captioned, measured again from pixels."""

from ditmem_jax.worlds.captions import caption as caption
from ditmem_jax.worlds.laws import PHENOMENA as PHENOMENA
from ditmem_jax.worlds.laws import RANGES as RANGES
from ditmem_jax.worlds.laws import Splits as Splits
from ditmem_jax.worlds.laws import World as World
from ditmem_jax.worlds.laws import splits as splits
from ditmem_jax.worlds.measure import Measurement as Measurement
from ditmem_jax.worlds.measure import measure as measure
from ditmem_jax.worlds.render import Camera as Camera
from ditmem_jax.worlds.simulate import Clip as Clip
from ditmem_jax.worlds.simulate import sample_clip as sample_clip
