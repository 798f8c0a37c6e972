"""What sink and source say on the control connection beside a communicator. The bytes of KV travel over NCCL.

After the proof of the link (`listener`, fixed little-endian headers as in `tcp_wire`):

    source: INVITATION (status, chunk bytes, unique id)
    both:   join the communicator, the source as rank 0; then JOINED each
    then, any number of times:
    sink:   REQUEST (length of lease id, number of runs, bytes), lease id, that many RUN (layer group, block, blocks)
    source: REPLY   (status, bytes); when it is OK the source sends the pieces, packed, in chunks of `chunk bytes`

Requests are answered in order, and a sink posts its receives in the order of the replies; it may ask for more while
bytes are on their way.
"""

import struct

MAGIC = b"BATONNC1"
UNIQUE_ID_BYTES = 128
SOURCE_RANK, SINK_RANK = 0, 1
INVITATION = struct.Struct(f"<IQ{UNIQUE_ID_BYTES}s")
JOINED = b"J"
REQUEST = struct.Struct("<HIQ")
RUN = struct.Struct("<III")
REPLY = struct.Struct("<IQ")
OK, REFUSED, WRONG_SIZE = 0, 1, 2
MAX_LEASE_ID_BYTES = 512
MAX_RUNS = 4096
MAX_PIECES = 1 << 16
MAX_CHUNK_BYTES = 1 << 30
