"""Text from tokens, one at a time: whole characters only, and nothing from a stop string on."""

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one completion as its bytes come in, up to the first stop string, no character ever cut.

    Text that may turn out to be the beginning of a stop string is held back. Of several stop strings the one that ends
    first counts, the longer one if two end together: so the text does not depend on how it was cut into tokens.

    Attributes:
        stopped: a stop string has been found; nothing more will come.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop, self._held = tuple(stop), ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """The text that `data` makes certain."""
        return self._advance(self._decoder.decode(data))

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        text = self._advance(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _advance(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        starts = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not the whole of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
