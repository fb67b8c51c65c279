# An outside with public addresses, in a network namespace; a second one beside it for the daemon, whose process id is printed
# when all servers are there. $1: a directory for a certificate.
set -e
ip link set lo up
for address in 11.0.0.1 11.0.0.2 10.9.9.9; do ip address add $address/32 dev lo; done
unshare --net sleep infinity &
inside=$!
until [ "$(readlink /proc/$inside/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add out type veth peer name in netns $inside
ip address add 11.0.0.254/24 dev out
ip link set out up
nsenter --net --target $inside sh -ec '
    ip link set lo up
    ip address add 11.0.0.100/24 dev in
    ip link set in up
    ip route add default via 11.0.0.254'

cd "$1"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=open.example \
    -addext subjectAltName=DNS:open.example -keyout key.pem -out cert.pem 2>/dev/null
openssl s_server -quiet -www -accept 443 -cert cert.pem -key key.pem >/dev/null 2>&1 </dev/null &
mkdir www
echo "the outside" >www/index.html
for port in 80 8080; do python3 -m http.server $port --directory www >/dev/null 2>&1 & done
python3 - <<'P' &
import socket
# open.example and closed.example share an address; private.example leads into a private network.
KNOWN = {'open.example': '11.0.0.1', 'closed.example': '11.0.0.1', 'private.example': '10.9.9.9'}
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('0.0.0.0', 53))
while True:
    query, client = s.recvfrom(4096)
    at, labels = 12, []
    while query[at]:
        labels.append(query[at + 1:at + 1 + query[at]].decode())
        at += 1 + query[at]
    question, kind = query[12:at + 5], query[at + 2]
    address = KNOWN.get('.'.join(labels).lower())
    found = address is not None and kind == 1
    answer = b'\xc0\x0c\0\x01\0\x01\0\0\x01\x2c\0\x04' + socket.inet_aton(address) if found else b''
    code = b'\x81\x80' if address else b'\x81\x83'
    s.sendto(query[:2] + code + b'\0\x01\0' + bytes([found]) + bytes(4) + question + answer, client)
P
for port in 80 443 8080; do until (exec 3<>/dev/tcp/11.0.0.1/$port) 2>/dev/null; do sleep 0.1; done; done
echo $inside
wait
