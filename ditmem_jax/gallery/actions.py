"""The page's answer to each click, as markup. A UserError becomes a notice; nothing else is caught."""

from collections.abc import Sequence

from ditmem_jax.errors import UserError
from ditmem_jax.gallery import views
from ditmem_jax.gallery.gallery import Gallery
from ditmem_jax.report.html import Html


class Actions:
    """The page's answers. `version` is None for the newest, which alone can be changed."""

    def __init__(self, gallery: Gallery):
        self.gallery = gallery

    def heading(self, version: int | None) -> Html:
        try:
            return views.heading(
                self.gallery.about(version), self.gallery.about().version, version is not None
            )
        except UserError as error:
            return views.notice(error, "error")

    def search(self, prompt: str, where: str, k: int, version: int | None) -> tuple[Html, Html | None]:
        """A sentence about what was found, and the cards; None keeps those that are shown."""
        try:
            found = self.gallery.search(prompt, where, int(k), version)
        except UserError as error:
            return views.notice(error, "error"), None
        cards = views.cards(found, self.gallery.clips, editable=version is None)
        return views.told(found, prompt, where), cards

    def remove(
        self, name: str, prompt: str, where: str, k: int, version: int | None
    ) -> tuple[Html, Html | None]:
        """Removes a video and searches again."""
        try:
            self._require_newest(version)
            self.gallery.remove(name)
            message = views.notice(f"Removed {name[: views.SHORT]}.", "good")
        except UserError as error:
            message = views.notice(error, "error")
        told, cards = self.search(prompt, where, k, version)
        return Html(message + told), cards

    def add(self, video: str | None, caption: str, version: int | None) -> tuple[Html, bool]:
        """Adds a video: what happened, with the new card, and whether it worked."""
        try:
            self._require_newest(version)
            if not video:
                raise UserError("No video was chosen.")
            row = self.gallery.row(self.gallery.add(video, caption))
            card = views.card(row, None, self.gallery.about().version, self.gallery.clips, editable=False)
        except UserError as error:
            return views.notice(error, "error"), False
        return Html(views.notice(f"Added as {row['id'][: views.SHORT]}.", "good") + views.one(card)), True

    def versions(self, version: int | None) -> Html:
        try:
            shown = self.gallery.about(version).version
            return views.versions(self.gallery.versions(), shown)
        except UserError as error:
            return views.notice(error, "error")

    def columns(self, version: int | None) -> Sequence[str]:
        try:
            return self.gallery.colourable(version)
        except UserError:
            return ()  # the heading says what is wrong

    def map(self, column: str | None, version: int | None) -> Html:
        try:
            return views.chart(self.gallery.map(column or None, version), column or None)
        except UserError as error:
            return views.notice(error, "error")

    def point(self, name: str, version: int | None) -> Html:
        """The card of a point of the map."""
        try:
            row, about = self.gallery.row(name, version), self.gallery.about(version)
            return views.one(views.card(row, None, about.version, self.gallery.clips, editable=False))
        except UserError as error:
            return views.notice(error, "error")

    def _require_newest(self, version: int | None) -> None:
        if version is not None:
            raise UserError(
                f"Version {version} is an older one, which cannot be changed.", fix="open the newest"
            )
