"""TFDS builders of published data sets, by the names that TFDS registers them under."""

from alignx_jax.data.builders.bactrian_x import BactrianX
from alignx_jax.data.builders.flores import Flores101, Flores200
from alignx_jax.data.builders.ntrex128 import Ntrex128
from alignx_jax.data.builders.opus100 import Opus100
from alignx_jax.data.builders.published import Multiway, Published

PARALLEL: dict[str, type[Published]] = {Opus100.name: Opus100}
INSTRUCTIONS: dict[str, type[Published]] = {BactrianX.name: BactrianX}
MULTIWAY: dict[str, type[Multiway]] = {builder.name: builder for builder in (Flores200, Flores101, Ntrex128)}
