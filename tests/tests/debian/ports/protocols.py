# Servers as guests run them: HTTP/2 without TLS on 8002 (RFC 9113), WebSocket on 8003 (RFC 6455). Both send back what they get.
import base64, hashlib, socket, struct, threading


def read(c, count):
    data = b''
    while len(data) < count:
        piece = c.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def frame(kind, flags, stream, body=b''):
    return struct.pack('>I', len(body))[1:] + bytes([kind, flags]) + struct.pack('>I', stream) + body


def http2(c):
    DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
    assert read(c, 24) == b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
    c.sendall(frame(SETTINGS, 0, 0))
    bodies = {}
    while True:
        head = read(c, 9)
        length, kind, flags = int.from_bytes(head[:3], 'big'), head[3], head[4]
        stream, body = int.from_bytes(head[5:], 'big'), read(c, length)
        if kind in (SETTINGS, PING) and not flags & 1:
            c.sendall(frame(kind, 1, 0, body if kind == PING else b''))
        if kind == DATA and body:
            bodies[stream] = bodies.get(stream, b'') + body
            more = struct.pack('>I', len(body))
            c.sendall(frame(WINDOW_UPDATE, 0, 0, more) + frame(WINDOW_UPDATE, 0, stream, more))
        if kind in (DATA, HEADERS) and flags & 1:
            # The header is ":status: 200", which has a number of its own.
            c.sendall(frame(HEADERS, 4, stream, b'\x88'))
            data = bodies.pop(stream, b'')
            for start in range(0, len(data), 16384):
                c.sendall(frame(DATA, 0, stream, data[start:start + 16384]))
            c.sendall(frame(DATA, 1, stream))


def websocket(c):
    head = b''
    while not head.endswith(b'\r\n\r\n'):
        head += read(c, 1)
    fields = dict(line.split(b': ', 1) for line in head.split(b'\r\n')[1:] if line)
    key = {name.lower(): value for name, value in fields.items()}[b'sec-websocket-key']
    accept = base64.b64encode(hashlib.sha1(key + b'258EAFA5-E914-47DA-95CA-C5AB0DC85B11').digest())
    c.sendall(b'HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n'
              b'Sec-WebSocket-Accept: ' + accept + b'\r\n\r\n')
    while True:
        first, length = read(c, 2)
        length &= 127
        if length > 125:
            length = int.from_bytes(read(c, 2 if length == 126 else 8), 'big')
        mask = int.from_bytes(read(c, 4) * (length // 4 + 1), 'big') >> 8 * (4 - length % 4)
        data = (int.from_bytes(read(c, length), 'big') ^ mask).to_bytes(length, 'big')
        form = (126, 2) if length < 65536 else (127, 8)
        size = bytes([length]) if length < 126 else bytes([form[0]]) + length.to_bytes(form[1], 'big')
        # A ping (9) is answered by a pong (10), all else by itself.
        kind = first & 15
        c.sendall(bytes([first & 128 | (10 if kind == 9 else kind)]) + size + data)
        if kind == 8:
            return c.close()


def listen(port, serve):
    s = socket.create_server(('127.0.0.1', port))
    while True:
        threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()


threading.Thread(target=listen, args=(8002, http2), daemon=True).start()
listen(8003, websocket)
