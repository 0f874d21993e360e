"""Decoding an indexed video (see video_index.py) from any packet on."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress

import av
from av.container import InputContainer
from av.video.frame import VideoFrame

from vae3d.data.decoding.containers import (
    DECODER_ERRORS,
    demux,
    media_error,
    media_errors,
    open_container,
    set_number,
)
from vae3d.data.decoding.video_index import VideoIndex
from vae3d.data.media import MediaError
from vae3d.data.storage.files import FileRange, RangeFile

BYTE_SEEK = {"mpegts", "mpeg"}  # seek these by byte: positions are exact, timestamps may not be
SEEK_WITHIN = 64  # packets after a seek among which the wanted one must be
# Codecs that mark each frame that no other needs (nal_ref_idc of H.264), so that the decoder can leave it out. In HEVC
# the mark holds only within a temporal layer.
SKIPPING = {"h264"}
KEYS_BACK = 4  # earlier key frames to retry from if a frame does not decode completely


class Wanted:
    """The packets whose frames a read needs. The reader sets them; FrameSource.decode asks for each packet.

    packets: their numbers; None: all. skipped: packets whose frames were not decoded, because nothing needs them.
    """

    def __init__(self) -> None:
        self.skipped: set[int] = set()
        self.set(None)

    def set(self, packets: Iterable[int] | None) -> None:
        self.packets = None if packets is None else frozenset(packets)
        self.last = max(self.packets or (), default=-1)

    def can_skip(self, packet: int) -> bool:
        """Whether the read needs no frame of this packet. Later packets are not skipped: the next read may go on."""
        return self.packets is not None and packet < self.last and packet not in self.packets


class FrameSource:
    """Decodes a file from a given packet on. Its file and decoder stay open, so that the next start costs less."""

    def __init__(self, file: FileRange, index: VideoIndex, threads: int = 1) -> None:
        self.range = file
        self.path, self.index, self.threads = self.range.name, index, threads
        self.file: RangeFile | None = None
        self.container: InputContainer | None = None
        self.decoder: av.VideoCodecContext | None = None
        self.reused = False  # whether the decoder was flushed, and not a new one, at the last start
        self.version: tuple | None = None  # of the file, if it may be kept open
        header = index.header
        # A flushed decoder and one that skips frames must number frames by their packets.
        self._reuses = header.ordered != "counted" and index.seek is None
        self._skips = header.ordered != "counted" and header.info.codec in SKIPPING

    def decode(
        self, start: int, wanted: Wanted | None = None, fresh: bool = True
    ) -> Iterator[tuple[int, list[tuple[int, VideoFrame]]]]:
        """Decode from packet `start` on. Yields for each packet its number and the frames that come out after it, each
        with the number of its packet (or its own number, if the order is "counted").

        wanted: frames that no other frame and no read needs are not decoded. fresh: with a new decoder, not a flushed
        one. Raises MediaError.
        """
        count = 0
        with media_errors(self.path, "cannot be decoded"):
            if self.index.seek is None:
                packets, context = self._stored(start), self._ready_decoder(fresh)
            else:
                packets, context = self._demuxed(start)
            for number, packet in packets:
                skipped = wanted is not None and self._skips and wanted.can_skip(number)
                if self._skips:
                    context.skip_frame = "NONREF" if skipped else "DEFAULT"
                try:
                    frames = context.decode(set_number(packet, number))
                except DECODER_ERRORS as error:
                    raise media_error(self.path, f"cannot be decoded at packet {number}", error) from error
                if skipped:
                    wanted.skipped.add(number)
                yield number, self._with_numbers(frames, count)
                count += len(frames)
            yield len(self.index.packets), self._with_numbers(context.decode(None), count)

    def _ready_decoder(self, fresh: bool) -> av.VideoCodecContext:
        self.reused = self._reuses and not fresh and self.decoder is not None
        if self.reused:
            self.decoder.flush_buffers()
        else:
            self.decoder = self.index.header.decoder.open(self.threads)
        return self.decoder

    def _with_numbers(self, frames: list[VideoFrame], count: int) -> list[tuple[int, VideoFrame]]:
        if self.index.header.ordered == "counted":
            return list(enumerate(frames, count))
        return [(frame.pts, frame) for frame in frames]

    def _stored(self, start: int) -> Iterator[tuple[int, av.Packet]]:
        """Packets read straight from the file."""
        if self.file is None:
            self.file = self.range.open()
        total = len(self.index.packets)
        for number in range(start, total):
            offset, size, key = self.index.packets[number].tolist()
            content = self.file.pread(size, offset)
            if len(content) < size:
                raise MediaError(self.path, f"ends within packet {number} of {total}")
            packet = av.Packet(size)  # with padding that the decoder may read; one made from `content` has none
            packet.update(content)
            packet.is_keyframe = bool(key)
            yield number, packet

    def _demuxed(self, start: int) -> tuple[Iterator[tuple[int, av.Packet]], av.VideoCodecContext]:
        """(packets read by the demuxer and compared with the index, its decoder)."""
        offset, size, _ = self.index.packets[start].tolist()
        crc, dts = self.index.seek[start].tolist()
        packets, context = self._open()
        if start:
            by_byte = self.container.format.name in BYTE_SEEK
            position = offset if by_byte else dts
            stream = self.container.streams[self.index.header.stream]
            with suppress(*DECODER_ERRORS):
                self.container.seek(position, stream=stream, unsupported_byte_offset=by_byte)
                for packet in itertools.islice(packets, SEEK_WITHIN):
                    found = packet.pos if by_byte else packet.dts
                    if (found, packet.size, zlib.crc32(packet)) == (position, size, crc):
                        return self._compared(itertools.chain([packet], packets), start), context
            packets, context = self._open()  # seeking failed: read from the start
        return self._compared(itertools.islice(packets, start, None), start), context

    def _open(self) -> tuple[Iterator[av.Packet], av.VideoCodecContext]:
        if self.container is not None:
            self.container.close()
        self.container = open_container(self.range)
        stream = self.container.streams[self.index.header.stream]
        stream.codec_context.thread_count = self.threads
        return demux(self.container, stream), stream.codec_context

    def _compared(self, packets: Iterator[av.Packet], start: int) -> Iterator[tuple[int, av.Packet]]:
        sizes, crcs = self.index.packets["size"], self.index.seek["crc"]
        # range comes first, so that zip takes no extra packet.
        for number, packet in zip(range(start, len(sizes)), packets):  # noqa: B905
            if (packet.size, zlib.crc32(packet)) != (sizes[number], crcs[number]):
                raise MediaError(self.path, f"packet {number} differs from the one that was indexed")
            yield number, packet

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.container is not None:
            self.container.close()
        self.file = self.container = self.decoder = None
