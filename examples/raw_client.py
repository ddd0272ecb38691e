# Distributed under the terms of the BSD 3-Clause License.
"""The wire format with pyzmq and the standard library alone: one cell there, its messages back.

A message is frames: identities or a topic, <IDS|MSG>, an HMAC of the next four frames, then header, parent
header, metadata and content as JSON.  Start a kernel, then name its connection file:

    python -m twoproc.kernel -f /tmp/k.json &
    python examples/raw_client.py /tmp/k.json "6 * 7"
"""
import datetime
import hmac
import json
import sys
import uuid

import zmq

if len(sys.argv) != 3:
    sys.exit("usage: python examples/raw_client.py CONNECTION-FILE CODE")
with open(sys.argv[1]) as file:
    info = json.load(file)
address = {"tcp": "tcp://%(ip)s:%%d", "ipc": "ipc://%(ip)s-%%d"}[info["transport"]] % info
shell, iopub = zmq.Context.instance().socket(zmq.DEALER), zmq.Context.instance().socket(zmq.SUB)
iopub.subscribe(b"")
iopub.connect(address % info["iopub_port"])
shell.connect(address % info["shell_port"])
iopub.recv_multipart()              # iopub_welcome: from here on no output is missed

header = {"msg_id": uuid.uuid4().hex, "session": uuid.uuid4().hex, "username": "raw", "version": "5.5",
          "msg_type": "execute_request", "date": datetime.datetime.now(datetime.timezone.utc).isoformat()}
parts = [json.dumps(part).encode() for part in (header, {}, {}, {"code": sys.argv[2], "allow_stdin": False})]
signature = hmac.new(info["key"].encode(), b"".join(parts), "sha256").hexdigest().encode()
shell.send_multipart([b"<IDS|MSG>", signature, *parts])
for sock in (iopub, shell):         # published until idle; then the reply
    while True:
        answer, parent, metadata, content = map(json.loads, sock.recv_multipart()[-4:])
        print(answer["msg_type"], {key: value for key, value in content.items() if value})
        if sock is shell or content.get("execution_state") == "idle":
            break
