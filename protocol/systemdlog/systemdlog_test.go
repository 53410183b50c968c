package systemdlog

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"foothold/protocol/digest"
)

// phase is a record as systemd 257 writes it.
func phase(word string) string {
	return fmt.Sprintf("\x1e"+`{"pcr":11,"digests":[{"hashAlg":"sha1","digest":"%040x"},{"hashAlg":"sha256","digest":"%s"}],"content_type":"systemd","content":{"string":%q,"bootId":"7d5a4b7c2f6e4d1c9b8a7f6e5d4c3b2a","timestamp":4061113,"eventType":"phase"}}`+"\n",
		1, digest.Of([]byte(word)), word)
}

// volume measures a key, whose digest is not its text's.
const volume = "\x1e" + `{"pcr":15,"digests":[{"hashAlg":"sha256","digest":"aa00000000000000000000000000000000000000000000000000000000000000"}],"content_type":"systemd","content":{"string":"cryptsetup:root:5e47a9db","bootId":"x","timestamp":1,"eventType":"volume-key"}}` + "\n"

// index is an NV index's.
const index = "\x1e" + `{"nv_index":30474752,"digests":[{"hashAlg":"sha256","digest":"` + "aa00000000000000000000000000000000000000000000000000000000000000" + `"}],"content_type":"systemd","content":{"nvIndexName":"hardware","string":"product-id:1"}}` + "\n"

func TestParse(t *testing.T) {
	log := phase("enter-initrd") + volume + index + phase("leave-initrd")
	list, err := Parse([]byte(log))
	if err != nil {
		t.Fatal(err)
	}
	want := []Record{
		{1, 11, digest.Of([]byte("enter-initrd")), "enter-initrd", "phase"},
		{2, 15, digest.SHA256{0xaa}, "cryptsetup:root:5e47a9db", "volume-key"},
		{4, 11, digest.Of([]byte("leave-initrd")), "leave-initrd", "phase"},
	}
	if len(list) != len(want) {
		t.Fatalf("%+v", list)
	}
	for i, r := range list {
		if r != want[i] || r.Authentic() != (r.PCR == 11) {
			t.Errorf("record %d: %+v, authentic %v", i+1, r, r.Authentic())
		}
	}
	other := strings.Replace(phase("ready"), `"systemd"`, `"other"`, 1)
	if list, err := Parse([]byte(other)); err != nil || len(list) != 1 || list[0].Text != "" || list[0].Authentic() {
		t.Errorf("another program's record: %+v, %v", list, err)
	}
	if list, err := Parse(nil); err != nil || len(list) != 0 {
		t.Errorf("an empty log: %+v, %v", list, err)
	}
}

func TestMalformedLogsAreRefused(t *testing.T) {
	good := phase("ready")
	swap := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("nothing to replace: %q", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	sum := digest.Of([]byte("ready")).String()
	for name, log := range map[string]string{
		"no separator":                good[1:],
		"cut in a record":             good + good[:len(good)/2],
		"cut before its end":          good[:len(good)-1],
		"a separator alone":           good + "\x1e",
		"an empty record":             good + "\x1e\n",
		"two objects in one":          swap("}}\n", "}}{}\n"),
		"no JSON":                     "\x1eready\n",
		"a list":                      "\x1e[]\n",
		"no register":                 swap(`"pcr":11,`, ``),
		"a register and an index":     swap(`"pcr":11,`, `"pcr":11,"nv_index":5,`),
		"register 24":                 swap(`"pcr":11`, `"pcr":24`),
		"a negative register":         swap(`"pcr":11`, `"pcr":-1`),
		"a register in words":         swap(`"pcr":11`, `"pcr":"11"`),
		"a register twice":            swap(`"pcr":11`, `"pcr":12,"pcr":11`),
		"a register by another case":  swap(`"pcr":11`, `"pcr":12,"PCR":11`),
		"an unknown field":            swap(`"pcr":11`, `"pcr":11,"register":12`),
		"no digests":                  swap(`"digests":`, `"recnum":1,"content":{},"x":`),
		"no digest of sha256":         swap(`"sha256"`, `"sha384"`),
		"a short digest":              swap(sum, sum[2:]),
		"a digest of no hexadecimals": swap(sum, "zz"+sum[2:]),
		"an algorithm twice":          swap(`"sha1","digest":"`+fmt.Sprintf("%040x", 1), `"sha256","digest":"`+sum),
		"a text that is no text":      swap(`"string":"ready"`, `"string":1`),
		"two texts":                   swap(`"string":"ready"`, `"string":"final","string":"ready"`),
		"no content":                  swap(`"content":{`, `"recnum":1,"content":null,"x":{`),
		"too many records":            strings.Repeat(index, MaxRecords+1),
		"too large":                   strings.Repeat(good, MaxSize/len(good)+1),
	} {
		if list, err := Parse([]byte(log)); err == nil {
			t.Errorf("%s: read as %+v", name, list)
		}
	}
}

// Whatever the bytes are: no panic, and what was read is written and read again as the same.
func FuzzParse(f *testing.F) {
	f.Add([]byte(phase("enter-initrd") + volume + index + phase("leave-initrd")))
	f.Add([]byte(strings.Replace(phase("ready"), `"systemd"`, `"other"`, 1)))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := Parse(data)
		if err != nil {
			return
		}
		// Records stand one after the other: each part of the log is a log.
		var again []Record
		for n, rest := 0, data; len(rest) > 0; n++ {
			one, after, _ := bytes.Cut(rest, []byte{end})
			part, err := Parse(append(bytes.Clone(one), end))
			if err != nil || len(part) > 1 {
				t.Fatalf("record %d alone: %+v, %v", n+1, part, err)
			}
			for _, r := range part {
				r.Number = n + 1
				again = append(again, r)
			}
			rest = after
		}
		if len(again) != len(list) {
			t.Fatalf("%d records, one by one %d", len(list), len(again))
		}
		for i, r := range list {
			if r != again[i] || r.PCR < 0 || r.PCR >= registers {
				t.Fatalf("record %+v, alone %+v", r, again[i])
			}
		}
	})
}
