"""Path, URL, bytes, array or list of images -> Frames.

`load` is the only entry. Presentation timestamps decide which frame is shown at a time; only the groups of pictures
that contain a wanted frame are decoded, and only wanted frames are converted and kept, bit-exact and at full size.
"""

from specvlm.media.frames import Frames, MediaWarning, Source
from specvlm.media.load import load

__all__ = ["Frames", "MediaWarning", "Source", "load"]
