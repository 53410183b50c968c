// Package systemdlog reads the log that a host's systemd keeps of what it measures after the
// kernel has started: the phases of the boot, identities of machine and file systems. It is
// the host's /run/log/systemd/tpm2-measure.log (systemd from 254; systemd's
// docs/TPM2_PCR_MEASUREMENTS.md).
//
//	log     records to the end
//	record  0x1E, a JSON object, line's end (RFC 7464, "JSON Text Sequences")
//
// An object is a record of TCG's Canonical Event Log in JSON, without its number:
//
//	pcr           register, or nv_index in its place: an index that stands for one
//	digests       [{hashAlg: "sha256", digest: hexadecimal}, ...], what each bank was extended by
//	content_type  "systemd"
//	content       {string, eventType, bootId, timestamp, ...}, what was measured
//
// As with the firmware's log, what replays to quoted registers is the sequence of digests and
// nothing else. The string counts only where [Record.Authentic] says that the digest is its;
// of a volume's key it never is: that is measured with the key.
//
// Logs come from hosts that may be hostile: every size and count has a limit, and what the
// format does not allow is an error.
package systemdlog

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"foothold/internal/strictjson"
	"foothold/protocol/digest"
)

// Limits. A boot makes some five records, and one a file system and volume.
const (
	MaxSize    = 256 << 10 // bytes of a log
	MaxRecords = 512
	maxDigests = 16 // of a record
	registers  = 24 // of a PC's TPM
)

// Record is one measurement into a register. Measurements into NV indices are read, and are
// no records: no quote of registers shows them.
type Record struct {
	Number int           // in the log, from 1
	PCR    int           // register, below 24
	SHA256 digest.SHA256 // what its SHA-256 bank was extended by
	Text   string        // a claim, but see Authentic
	Type   string        // a claim: "phase", "machine-id", "filesystem"
}

// Authentic reports whether the digest that was extended is the text's, so that the register
// proves the text and not the digest alone.
func (r Record) Authentic() bool { return r.SHA256 == digest.Of([]byte(r.Text)) }

// Begins and ends a record.
const begin, end = 0x1e, '\n'

// Parse reads a log of at most [MaxSize] bytes. An empty one has no records.
func Parse(data []byte) ([]Record, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("systemd's log: it has %d bytes, at most %d are read", len(data), MaxSize)
	}
	var list []Record
	for n := 1; len(data) > 0; n++ {
		if n > MaxRecords {
			return nil, fmt.Errorf("systemd's log: it has more than %d records", MaxRecords)
		}
		text, rest, err := cut(data)
		if err != nil {
			return nil, fmt.Errorf("systemd's log: record %d: %w", n, err)
		}
		r, ok, err := parse(text)
		if err != nil {
			return nil, fmt.Errorf("systemd's log: record %d: %w", n, err)
		}
		if r.Number = n; ok {
			list = append(list, r)
		}
		data = rest
	}
	return list, nil
}

// cut takes a record off the front. JSON has neither byte within a text on one line: a
// string's control characters are escaped.
func cut(data []byte) (text, rest []byte, err error) {
	if data[0] != begin {
		return nil, nil, errors.New("it does not begin with a record separator")
	}
	text, rest, ok := bytes.Cut(data[1:], []byte{end})
	if !ok {
		return nil, nil, errors.New("the log ends in the middle of it")
	}
	return text, rest, nil
}

// record is a record's JSON. Pointers tell what is absent. Of the content, whose fields grow
// with systemd's versions, two are read.
type record struct {
	Number  *uint64         `json:"recnum"`
	PCR     *uint32         `json:"pcr"`
	NVIndex *uint32         `json:"nv_index"`
	Digests []hashed        `json:"digests"`
	Type    *string         `json:"content_type"`
	Content json.RawMessage `json:"content"`
}

type hashed struct {
	Algorithm string `json:"hashAlg"`
	Digest    string `json:"digest"`
}

// parse reads a record's object; ok is false for one of an NV index.
func parse(text []byte) (r Record, ok bool, err error) {
	var in record
	if err := strictjson.Unmarshal(text, &in); err != nil {
		return r, false, err
	}
	if (in.PCR == nil) == (in.NVIndex == nil) {
		return r, false, errors.New("want pcr or nv_index, and one of them")
	}
	sum, err := sha256Of(in.Digests)
	if err != nil {
		return r, false, err
	}
	if in.PCR == nil {
		return r, false, nil
	}
	switch {
	case *in.PCR >= registers:
		return r, false, fmt.Errorf("there is no register %d", *in.PCR)
	case sum == nil:
		return r, false, errors.New("it has no digest of sha256")
	}
	r = Record{PCR: int(*in.PCR), SHA256: *sum}
	if in.Type == nil || *in.Type != "systemd" {
		return r, true, nil // nothing is read from what another program wrote
	}
	var content map[string]json.RawMessage
	if err := strictjson.Unmarshal(in.Content, &content); err != nil {
		return r, false, fmt.Errorf("content: %w", err)
	}
	for name, to := range map[string]*string{"string": &r.Text, "eventType": &r.Type} {
		if value, is := content[name]; is {
			if err := strictjson.Unmarshal(value, to); err != nil {
				return r, false, fmt.Errorf("content: %s: %w", name, err)
			}
		}
	}
	return r, true, nil
}

// sha256Of is the digest of that algorithm; nil if there is none. An algorithm comes once.
func sha256Of(list []hashed) (sum *digest.SHA256, err error) {
	if len(list) == 0 || len(list) > maxDigests {
		return nil, fmt.Errorf("it has %d digests, want 1 to %d", len(list), maxDigests)
	}
	seen := map[string]bool{}
	for _, d := range list {
		if d.Algorithm == "" || seen[d.Algorithm] {
			return nil, errors.New("a digest without algorithm, or a second one of its")
		}
		seen[d.Algorithm] = true
		value, err := hex.DecodeString(d.Digest)
		if err != nil || len(value) == 0 {
			return nil, errors.New("a digest that is not hexadecimal")
		}
		if d.Algorithm != "sha256" {
			continue
		}
		if len(value) != len(digest.SHA256{}) {
			return nil, fmt.Errorf("a digest of sha256 has %d bytes", len(value))
		}
		sum = (*digest.SHA256)(value)
	}
	return sum, nil
}
