// Package imalog reads the list that a host's kernel keeps of the files that it measured
// before it used them (Linux, Documentation/security/IMA-templates.rst), as
// /sys/kernel/security/ima/binary_runtime_measurements gives it, and replays it.
//
//	list   entries to the end
//	entry  register u32 | SHA-1 of data [20] | size u32, template | size u32, data
//	data   fields of the template, each: size u32 | value
//
// Integers are little endian. Templates that we read:
//
//	ima-ng   digest of the file, path
//	ima-sig  digest of the file, path, signature (empty where the file has none)
//
// where the digest is "ALGORITHM:", a zero byte, and the bytes. A kernel extends each bank
// of the TPM with that bank's own hash over an entry's data (since 5.8), so the data of an
// entry that replays are proved, unlike those of a firmware log's. A list grows while the
// host runs: what a quote proves is a beginning of it, see [List.Prefix].
package imalog

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"foothold/protocol/digest"
)

// Limits. A host of ours runs a few hundred files; a distribution's desktop some ten thousand.
const (
	MaxSize     = 16 << 20 // bytes of a list
	MaxEntries  = 1 << 16
	maxTemplate = 32   // bytes of a template's name
	maxField    = 4096 // bytes of a path, a digest or a signature
)

// Register is the one that kernels extend, unless CONFIG_IMA_MEASURE_PCR_IDX says otherwise;
// entries of another are refused.
const Register = 10

// Entry is one measurement of a file. Its slices are parts of the list that was parsed.
type Entry struct {
	Number    int    // from 1
	Path      string // any bytes but zero, as the kernel has it
	Algorithm string // of Digest, as the kernel names it: "sha256"
	Digest    []byte
	Signature []byte // nil where the file has none

	// Violation: the kernel could not tell what it measured, because the file was open for
	// writing. Path and digest of such an entry are not proved.
	Violation bool

	extended digest.SHA256
}

// List is a parsed list.
type List struct{ Entries []Entry }

// Parse reads a list of at most [MaxSize] bytes, and keeps no copy of it.
func Parse(data []byte) (*List, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("kernel's list: it has %d bytes, at most %d are read", len(data), MaxSize)
	}
	l := &List{}
	for n := 1; len(data) > 0; n++ {
		if n > MaxEntries {
			return nil, fmt.Errorf("kernel's list: it has more than %d entries", MaxEntries)
		}
		e, rest, err := parseEntry(data)
		if err != nil {
			return nil, fmt.Errorf("kernel's list: entry %d: %w", n, err)
		}
		e.Number = n
		l.Entries, data = append(l.Entries, e), rest
	}
	return l, nil
}

var errShort = errors.New("the list ends in the middle of it")

// part takes n bytes off the front.
func part(data []byte, n int) (head, rest []byte, err error) {
	if n > len(data) {
		return nil, nil, errShort
	}
	return data[:n:n], data[n:], nil
}

// sized takes as many bytes off the front as the integer there says, at most limit.
func sized(data []byte, limit int) (head, rest []byte, err error) {
	size, rest, err := part(data, 4)
	if err != nil {
		return nil, nil, err
	}
	n := binary.LittleEndian.Uint32(size)
	if uint64(n) > uint64(limit) {
		return nil, nil, fmt.Errorf("a part has %d bytes, at most %d are read", n, limit)
	}
	return part(rest, int(n))
}

func parseEntry(data []byte) (e Entry, rest []byte, err error) {
	head, rest, err := part(data, 4+20)
	if err != nil {
		return e, nil, err
	}
	if reg := binary.LittleEndian.Uint32(head); reg != Register {
		return e, nil, fmt.Errorf("it extends register %d, want %d", reg, Register)
	}
	template, rest, err := sized(rest, maxTemplate)
	if err != nil {
		return e, nil, err
	}
	content, rest, err := sized(rest, 4*maxField)
	if err != nil {
		return e, nil, err
	}
	if err := e.fields(string(template), content); err != nil {
		return e, nil, err
	}
	// The kernel writes zeros for a violation, and extends ones.
	e.Violation = bytes.Count(head[4:], []byte{0}) == 20
	if e.Violation {
		e.extended = digest.SHA256(bytes.Repeat([]byte{0xff}, sha256.Size))
	} else {
		e.extended = digest.Of(content)
	}
	return e, rest, nil
}

// fields reads an entry's data. Nothing may be left over.
func (e *Entry) fields(template string, data []byte) error {
	if template != "ima-ng" && template != "ima-sig" {
		return fmt.Errorf("its template is %.40q, want ima-ng or ima-sig", template)
	}
	sum, data, err := sized(data, maxField)
	if err != nil {
		return err
	}
	path, data, err := sized(data, maxField)
	if err != nil {
		return err
	}
	if template == "ima-sig" {
		if e.Signature, data, err = sized(data, maxField); err != nil {
			return err
		}
		if len(e.Signature) == 0 {
			e.Signature = nil
		}
	}
	if len(data) > 0 {
		return errors.New("its data go on after the last field")
	}
	name, value, ok := bytes.Cut(sum, []byte{':', 0})
	if !ok || len(name) == 0 || len(value) == 0 {
		return errors.New("its digest is in another form")
	}
	e.Algorithm, e.Digest = string(name), value
	// A path ends with its only zero byte, so that two entries never mean one.
	text, ok := bytes.CutSuffix(path, []byte{0})
	if !ok || bytes.IndexByte(text, 0) >= 0 {
		return errors.New("its path is in another form")
	}
	e.Path = string(text)
	return nil
}

// Replay gives the register that the first n entries lead to.
func (l *List) Replay(n int) digest.SHA256 {
	var value digest.SHA256
	for _, e := range l.Entries[:n] {
		value = extend(value, e.extended)
	}
	return value
}

// Prefix finds how many entries lead to a register for which matches says true; false if
// no beginning of the list does. A host's list may have grown since the quote, never shrunk,
// and mostly by little: the longest beginnings are tried first.
func (l *List) Prefix(matches func(digest.SHA256) bool) (int, bool) {
	values := make([]digest.SHA256, len(l.Entries)+1)
	for i, e := range l.Entries {
		values[i+1] = extend(values[i], e.extended)
	}
	for n := len(l.Entries); n >= 0; n-- {
		if matches(values[n]) {
			return n, true
		}
	}
	return 0, false
}

func extend(old, measurement digest.SHA256) digest.SHA256 {
	return sha256.Sum256(append(old[:], measurement[:]...))
}
