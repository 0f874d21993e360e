"""Containers opened by libav: which formats, which options, and what its errors become."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from vae3d.data.media import MediaError
from vae3d.data.storage.files import FileRange
from vae3d.errors import UserError
from vae3d.text import one_line

# What libav and PyAV raise for a damaged file. Other exceptions are bugs of ours.
DECODER_ERRORS = (av.error.FFmpegError, OSError, ValueError, MemoryError, RuntimeError, LookupError, ArithmeticError)

# Demuxers that read only the file they are given; not those of playlists and scripts, which open other files.
FORMATS = (
    "mov,matroska,avi,mpeg,mpegts,mpegtsraw,mpegvideo,m4v,h264,hevc,vvc,obu,ivf,flv,asf,ogg,gif,rm,dv,mxf,nut,wtv,mjpeg,"
    "yuv4mpegpipe,vc1,h263,swf,4xm,nsv,roq,bink,smk,fli,apng,aac,mp3,wav,flac,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,gif_pipe,ppm_pipe,pgm_pipe,j2k_pipe,jpegxl_pipe,image2"
)
OPEN_OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
RANGE_OPTIONS = {
    "format_whitelist": FORMATS.removesuffix(",image2"),
    "protocol_whitelist": "none",
}  # image2 opens files

# Accept metadata of any encoding, as PyAV 19 does by default.
METADATA = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
DISCARD_ALL = 48  # AVDiscard


def open_container(file: FileRange) -> InputContainer:
    """Open a video by libav, which opens no other file. Raises DECODER_ERRORS."""
    if not file.is_plain:  # libav reads through Python, and opens nothing itself
        return av.open(file.open(), options=RANGE_OPTIONS, **METADATA)
    # Absolute, because ffmpeg takes the part before a colon for a protocol.
    return av.open(os.path.abspath(file.file), options=OPEN_OPTIONS, **METADATA)


def demux(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The non-empty packets of a stream. The demuxer skips all other streams."""
    for other in container.streams:
        if other is not stream and hasattr(other, "discard"):  # PyAV 17 has no such attribute, and reads all streams
            other.discard = DISCARD_ALL
    return (packet for packet in container.demux(stream) if packet.size)


def set_number(packet: av.Packet, number: int) -> av.Packet:
    """The packet with its number in place of its timestamps, which the decoder passes on to its frame."""
    packet.pts = packet.dts = number
    return packet


@contextmanager
def media_errors(path: str | Path, what: str) -> Iterator[None]:
    """Raise errors of the demuxer or decoder as MediaError of the file."""
    try:
        yield
    except UserError:  # of this file, or of its store
        raise
    except DECODER_ERRORS as error:
        raise media_error(path, what, error) from error


def media_error(path: str | Path, what: str, error: Exception) -> MediaError:
    """The MediaError of one of DECODER_ERRORS. what: failed, such as "cannot be decoded"."""
    text = "out of memory" if isinstance(error, MemoryError) else getattr(error, "strerror", None)
    return MediaError(path, f"{what}: {text or one_line(error, 200)}")
