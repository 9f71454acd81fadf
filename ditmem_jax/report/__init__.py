"""Pages to look at: one file of HTML each, with text, tables, charts and clips that play in step."""

from ditmem_jax.report.films import Film as Film
from ditmem_jax.report.films import FilmRow as FilmRow
from ditmem_jax.report.films import animation as animation
from ditmem_jax.report.films import film_grid as film_grid
from ditmem_jax.report.html import Html as Html
from ditmem_jax.report.html import tag as tag
from ditmem_jax.report.page import code as code
from ditmem_jax.report.page import details as details
from ditmem_jax.report.page import figure as figure
from ditmem_jax.report.page import legend as legend
from ditmem_jax.report.page import page as page
from ditmem_jax.report.page import paragraph as paragraph
from ditmem_jax.report.page import section as section
from ditmem_jax.report.page import side_by_side as side_by_side
from ditmem_jax.report.page import table as table
from ditmem_jax.report.svg import Axis as Axis
from ditmem_jax.report.svg import Interval as Interval
from ditmem_jax.report.svg import Series as Series
from ditmem_jax.report.svg import intervals as intervals
from ditmem_jax.report.svg import plot as plot
