// Package config reads a daemon's configuration: one YAML document, unknown fields
// and further documents refused.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/goccy/go-yaml"
)

// Read decodes the file into v, which has the defaults set already.
func Read(file string, v any) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
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
