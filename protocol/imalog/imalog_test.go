package imalog

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"reflect"
	"testing"

	"foothold/protocol/digest"
)

func field(data []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(data))), data...)
}

// content is the data of an entry of template ima-sig, or ima-ng where sig is nil.
func content(path string, sum, sig []byte) []byte {
	out := append(field(append([]byte("sha256:\x00"), sum...)), field(append([]byte(path), 0))...)
	if sig != nil {
		out = append(out, field(sig)...)
	}
	return out
}

func entry(register uint32, sha1 byte, template string, data []byte) []byte {
	out := binary.LittleEndian.AppendUint32(nil, register)
	out = append(out, bytes.Repeat([]byte{sha1}, 20)...)
	return append(append(out, field([]byte(template))...), field(data)...)
}

func sum(text string) []byte {
	s := sha256.Sum256([]byte(text))
	return s[:]
}

// list is an aggregate, a signed file, and one that was being written to.
func list() []byte {
	return bytes.Join([][]byte{
		entry(Register, 1, "ima-ng", content("boot_aggregate", sum("registers"), nil)),
		entry(Register, 1, "ima-sig", content("/usr/bin/agent", sum("agent"), []byte("signature"))),
		entry(Register, 1, "ima-sig", content("/usr/bin/un signed\xff", sum("other"), []byte{})),
		entry(Register, 0, "ima-ng", content("/var/log/messages", make([]byte, 32), nil)),
	}, nil)
}

func TestParse(t *testing.T) {
	l, err := Parse(list())
	if err != nil {
		t.Fatal(err)
	}
	for i := range l.Entries {
		l.Entries[i].extended = digest.SHA256{}
	}
	want := []Entry{
		{Number: 1, Path: "boot_aggregate", Algorithm: "sha256", Digest: sum("registers")},
		{Number: 2, Path: "/usr/bin/agent", Algorithm: "sha256", Digest: sum("agent"), Signature: []byte("signature")},
		{Number: 3, Path: "/usr/bin/un signed\xff", Algorithm: "sha256", Digest: sum("other")},
		{Number: 4, Path: "/var/log/messages", Algorithm: "sha256", Digest: make([]byte, 32), Violation: true},
	}
	if !reflect.DeepEqual(l.Entries, want) {
		t.Errorf("read %+v, want %+v", l.Entries, want)
	}
}

func TestReplay(t *testing.T) {
	l, err := Parse(list())
	if err != nil {
		t.Fatal(err)
	}
	var value digest.SHA256
	var values []digest.SHA256
	for _, measured := range [][]byte{
		sum(string(content("boot_aggregate", sum("registers"), nil))),
		sum(string(content("/usr/bin/agent", sum("agent"), []byte("signature")))),
		sum(string(content("/usr/bin/un signed\xff", sum("other"), []byte{}))),
		bytes.Repeat([]byte{0xff}, 32), // a violation
	} {
		value = sha256.Sum256(append(value[:], measured...))
		values = append(values, value)
	}
	for n, want := range values {
		if got := l.Replay(n + 1); got != want {
			t.Errorf("%d entries lead to %s, want %s", n+1, got, want)
		}
		// The list has grown since the quote: only its beginning is proved.
		got, ok := l.Prefix(func(d digest.SHA256) bool { return d == want })
		if !ok || got != n+1 {
			t.Errorf("a quote after %d entries proves %d, %v", n+1, got, ok)
		}
	}
	if n, ok := l.Prefix(func(digest.SHA256) bool { return false }); ok {
		t.Errorf("a register that the list does not lead to proves %d entries", n)
	}
	if n, ok := l.Prefix(func(d digest.SHA256) bool { return d.IsZero() }); !ok || n != 0 {
		t.Errorf("an empty register proves %d entries, %v", n, ok)
	}
}

// Whoever passes a file that was being written to for one that was measured, or takes an
// entry out, or turns two round, is at odds with the register.
func TestEveryLieLeadsElsewhere(t *testing.T) {
	truth, err := Parse(list())
	if err != nil {
		t.Fatal(err)
	}
	want := truth.Replay(4)
	parts := [][]byte{}
	for rest := list(); len(rest) > 0; {
		_, after, err := parseEntry(rest)
		if err != nil {
			t.Fatal(err)
		}
		parts, rest = append(parts, rest[:len(rest)-len(after)]), after
	}
	hidden := bytes.Clone(parts[3])
	copy(hidden[4:], bytes.Repeat([]byte{1}, 20))
	violated := bytes.Clone(parts[1])
	copy(violated[4:], make([]byte, 20))
	for name, lie := range map[string][][]byte{
		"a violation hidden":   {parts[0], parts[1], parts[2], hidden},
		"a violation invented": {parts[0], violated, parts[2], parts[3]},
		"one left out":         {parts[0], parts[2], parts[3]},
		"two turned round":     {parts[0], parts[2], parts[1], parts[3]},
		"one twice":            {parts[0], parts[0], parts[1], parts[2], parts[3]},
		"another path":         {parts[0], bytes.Replace(parts[1], []byte("agent"), []byte("agenT"), 1), parts[2], parts[3]},
		"another template":     {entry(Register, 1, "ima-sig", content("boot_aggregate", sum("registers"), []byte{})), parts[1], parts[2], parts[3]},
	} {
		l, err := Parse(bytes.Join(lie, nil))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if n, ok := l.Prefix(func(d digest.SHA256) bool { return d == want }); ok {
			t.Errorf("%s: %d entries lead to the true register", name, n)
		}
	}
}

func TestMalformedListsAreRefused(t *testing.T) {
	good := content("/bin/sh", sum("sh"), nil)
	gigabyte := entry(Register, 1, "ima-ng", good)
	binary.LittleEndian.PutUint32(gigabyte[4+20+4+6:], 1<<30)
	for name, data := range map[string][]byte{
		"cut in the header":      list()[:10],
		"cut in the data":        list()[:len(list())-1],
		"one byte more":          append(list(), 0),
		"another register":       entry(11, 1, "ima-ng", good),
		"an unknown template":    entry(Register, 1, "ima-buf", good),
		"no template":            entry(Register, 1, "", good),
		"a signature too many":   entry(Register, 1, "ima-ng", content("/bin/sh", sum("sh"), []byte{1})),
		"a signature too few":    entry(Register, 1, "ima-sig", good),
		"bytes after the fields": entry(Register, 1, "ima-ng", append(bytes.Clone(good), 0)),
		"a gigabyte":             gigabyte,
		"no data":                entry(Register, 1, "ima-ng", nil),
		"a digest without name":  entry(Register, 1, "ima-ng", append(field(sum("sh")), field([]byte("/bin/sh\x00"))...)),
		"a path without end":     entry(Register, 1, "ima-ng", append(field(append([]byte("sha256:\x00"), sum("sh")...)), field([]byte("/bin/sh"))...)),
		"a path with two ends":   entry(Register, 1, "ima-ng", content("/bin/sh\x00", sum("sh"), nil)),
		"a long path":            entry(Register, 1, "ima-ng", content(string(make([]byte, maxField)), sum("sh"), nil)),
		"too many entries":       bytes.Repeat(entry(Register, 1, "ima-ng", good), MaxEntries+1),
		"too many bytes":         make([]byte, MaxSize+1),
	} {
		if l, err := Parse(data); err == nil {
			t.Errorf("%s: read as %d entries", name, len(l.Entries))
		}
	}
	if l, err := Parse(nil); err != nil || len(l.Entries) != 0 {
		t.Errorf("an empty list: %v, %v", l, err)
	}
}

// Whatever the bytes are: no panic, and one meaning. Two lists that are read as the same
// entries lead to the same register.
func FuzzParse(f *testing.F) {
	f.Add(list())
	f.Add(entry(Register, 0, "ima-sig", content("/bin/sh", sum("sh"), []byte{})))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := Parse(data)
		if err != nil {
			return
		}
		again := []byte{}
		for i, e := range l.Entries {
			const name = 4 + 20 + 4 // where the template's stands
			template, sig := string(data[name:name+binary.LittleEndian.Uint32(data[name-4:])]), []byte(nil)
			if template == "ima-sig" {
				sig = append([]byte{}, e.Signature...)
			}
			c := append(field(append([]byte(e.Algorithm+":\x00"), e.Digest...)), field(append([]byte(e.Path), 0))...)
			if sig != nil {
				c = append(c, field(sig)...)
			}
			written := entry(Register, data[4], template, c)
			copy(written[4:24], data[4:24])
			if !bytes.HasPrefix(data, written) {
				t.Fatalf("entry %d is read as %+v, which is written otherwise", i+1, e)
			}
			again, data = append(again, written...), data[len(written):]
		}
		other, err := Parse(again)
		if err != nil || other.Replay(len(other.Entries)) != l.Replay(len(l.Entries)) {
			t.Fatalf("read again: %v", err)
		}
	})
}
