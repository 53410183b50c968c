// Package frame carries JSON messages over a byte stream: u32be length, then that
// many bytes of one JSON document, decoded strictly. It serves the VM's local channel
// and the unlock channel.
package frame

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"

	"foothold/internal/strictjson"
)

// Write sends v as one frame of at most limit bytes, in one Write.
func Write(w io.Writer, limit int, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode frame: %w", err)
	}
	if len(data) > limit {
		return fmt.Errorf("frame of %d bytes is over its limit of %d", len(data), limit)
	}
	out := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(data)), uint32(len(data)))
	out = append(out, data...)
	clear(data) // it may hold secrets
	defer clear(out)
	if _, err := w.Write(out); err != nil {
		return fmt.Errorf("write frame: %w", err)
	}
	return nil
}

// Read receives one frame of at most limit bytes into v. It returns io.EOF
// unwrapped when the stream ends between frames.
func Read(r io.Reader, limit int, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		if err == io.EOF {
			return io.EOF
		}
		return fmt.Errorf("read frame: %w", err)
	}
	n := binary.BigEndian.Uint32(head[:])
	if uint64(n) > uint64(limit) {
		return fmt.Errorf("frame of %d bytes is over its limit of %d", n, limit)
	}
	data := make([]byte, n)
	defer clear(data) // it may hold secrets; what is decoded is copied
	if _, err := io.ReadFull(r, data); err != nil {
		return fmt.Errorf("read frame: %w", err)
	}
	return strictjson.Unmarshal(data, v)
}
