// Package config reads a daemon's configuration: one YAML document, unknown fields
// and further documents refused.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"foothold/protocol/digest"

	"github.com/goccy/go-yaml"
)

// Read decodes the file into v, which has the defaults set already.
func Read(file string, v any) error {
	_, err := ReadMeasured(file, v)
	return err
}

// ReadMeasured is Read, and returns the digest of the very bytes that were decoded.
func ReadMeasured(file string, v any) (digest.SHA256, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return digest.SHA256{}, fmt.Errorf("read configuration: %w", err)
	}
	return digest.Of(data), decode(file, data, v)
}

func decode(file string, data []byte, v any) error {
	dec := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict())
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("read configuration %s: %w", file, err)
	}
	var more any
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		return fmt.Errorf("read configuration %s: a second document", file)
	}
	return nil
}
