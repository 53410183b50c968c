// Package mtlstest makes TLS messages that no TLS library sends.
package mtlstest

import (
	"crypto/tls"
	"encoding/binary"
	"net"
	"testing"
)

// EarlyHello is a ClientHello for a server's name that announces early data (RFC 8446,
// section 4.2.10), as a record.
func EarlyHello(t testing.TB, serverName string) []byte {
	t.Helper()
	here, there := net.Pipe()
	defer there.Close()
	go tls.Client(here, &tls.Config{MinVersion: tls.VersionTLS13, ServerName: serverName}).Handshake()
	hello := make([]byte, 4096)
	n, err := there.Read(hello)
	if err != nil {
		t.Fatal(err)
	}
	hello = hello[:n]
	const head, fixed = 5 + 4, 2 + 32 // record and message, version and random
	at := head + fixed
	at += 1 + int(hello[at])                                // session
	at += 2 + int(binary.BigEndian.Uint16(hello[at:]))      // cipher suites
	at += 1 + int(hello[at])                                // compression
	if at+2+int(binary.BigEndian.Uint16(hello[at:])) != n { // the extensions are the rest
		t.Fatalf("a ClientHello of %d bytes has its extensions at %d", n, at)
	}
	hello = append(hello, 0, 42, 0, 0)
	for _, field := range []int{3, 7, at} { // lengths of record, message (its lower half), extensions
		binary.BigEndian.PutUint16(hello[field:], binary.BigEndian.Uint16(hello[field:])+4)
	}
	return hello
}
