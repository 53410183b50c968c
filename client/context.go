// Package client is how people and tools on the tenant's side talk to the
// orchestrator: contexts, and the API of protocol/api over mutual TLS.
//
// A context is a small YAML file,
//
//	name: lab
//	server: 127.0.0.1:8443          # the orchestrator's operator API
//	ca: operator-ca.pem             # authority of its certificate
//	cert: operator.pem              # this operator's certificate
//	key: operator.key
//	component_key: component.key    # optional: signs boot components in `template build`
//	cache: cache                    # optional: where `template build` keeps packages
//	templates: templates            # optional: where `template build` keeps templates
//	volume: authenticated           # optional: kind of volume that `template build` asks for, or "encrypted"
//
// whose paths are absolute or relative to the file. It is found in this order:
// the --context flag, the FOOTHOLD_CONTEXT variable, and the file that the user's
// remembered context names ([Remember]; `foothold lab up` does so). The private key
// is read from its file when a connection is made and is never printed.
package client

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"foothold/internal/config"
	"foothold/internal/durable"

	"github.com/goccy/go-yaml"
)

// Variable names the environment variable that overrides the remembered context.
const Variable = "FOOTHOLD_CONTEXT"

// Context says which orchestrator to talk to, and as whom.
type Context struct {
	// Name is shown to people.
	Name string `yaml:"name"`
	// Server is HOST:PORT or https://HOST:PORT of the operator API.
	Server string `yaml:"server"`
	// CA, Cert and Key are PEM files: the server's authority, and this operator's certificate and key.
	CA   string `yaml:"ca"`
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
	// ComponentKey is the file of the organisation's component key. Only who builds templates has it.
	ComponentKey string `yaml:"component_key,omitempty"`
	// Cache is where template builds keep packages and bootstraps.
	Cache string `yaml:"cache,omitempty"`
	// Templates is where built templates lie.
	Templates string `yaml:"templates,omitempty"`
	// Guest is the foothold-guest binary that template builds put into the initramfs.
	Guest string `yaml:"guest,omitempty"`
	// Volume is the kind of volume that VMs of newly built templates have: VolumeAuthenticated,
	// which is the default, or VolumeEncrypted.
	Volume string `yaml:"volume,omitempty"`

	// File is where the context was read from, Source how it was found.
	File   string `yaml:"-"`
	Source string `yaml:"-"`
}

// Kinds of a VM's own volume.
const (
	VolumeAuthenticated = "authenticated" // encrypted, with a tag beside each sector
	VolumeEncrypted     = "encrypted"     // encryption alone: an altered sector reads as noise
)

// ErrNoContext is returned when no context is named anywhere.
var ErrNoContext = errors.New("no context: start a lab with `foothold lab up`, or name a file with --context or " + Variable)

// Find reads the context that flag, environment or the user's state names.
func Find(flag string) (Context, error) {
	if flag != "" {
		return read(flag, "--context")
	}
	if file := os.Getenv(Variable); file != "" {
		return read(file, Variable)
	}
	file, err := Remembered()
	if err != nil {
		return Context{}, err
	}
	return read(file, "remembered")
}

func read(file, source string) (Context, error) {
	c := Context{}
	if err := config.Read(file, &c); err != nil {
		return c, err
	}
	abs, err := filepath.Abs(file)
	if err != nil {
		return c, fmt.Errorf("find context: %w", err)
	}
	c.File, c.Source = abs, source
	for _, p := range []*string{&c.CA, &c.Cert, &c.Key, &c.ComponentKey, &c.Cache, &c.Templates, &c.Guest} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(filepath.Dir(abs), *p)
		}
	}
	return c, c.validate()
}

func (c Context) validate() error {
	for _, f := range []struct{ name, value string }{
		{"server", c.Server}, {"ca", c.CA}, {"cert", c.Cert}, {"key", c.Key},
	} {
		if f.value == "" {
			return fmt.Errorf("context %s: %s is missing", c.File, f.name)
		}
	}
	if c.Volume != "" && c.Volume != VolumeAuthenticated && c.Volume != VolumeEncrypted {
		return fmt.Errorf("context %s: volume is neither %s nor %s", c.File, VolumeAuthenticated, VolumeEncrypted)
	}
	_, err := c.address()
	return err
}

// address is HOST:PORT of the server.
func (c Context) address() (string, error) {
	addr := c.Server
	if strings.Contains(addr, "://") {
		u, err := url.Parse(addr)
		if err != nil || u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.User != nil {
			return "", fmt.Errorf("context %s: server is not https://HOST:PORT", c.File)
		}
		addr = u.Host
	}
	if host, port, err := net.SplitHostPort(addr); err != nil || host == "" || port == "" {
		return "", fmt.Errorf("context %s: server is not HOST:PORT", c.File)
	}
	return addr, nil
}

// Write makes a context file.
func Write(file string, c Context) error {
	data, err := yaml.Marshal(c)
	if err != nil {
		return fmt.Errorf("write context: %w", err)
	}
	return durable.WriteFile(file, data, 0o600)
}

// rememberedFile holds the path of the last context, one line.
func rememberedFile() (string, error) {
	dir := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(dir) {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("find remembered context: %w", err)
		}
		dir = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(dir, "foothold", "context"), nil
}

// Remembered is the context file that [Remember] noted last, or [ErrNoContext].
func Remembered() (string, error) {
	note, err := rememberedFile()
	if err != nil {
		return "", err
	}
	data, err := os.ReadFile(note)
	if errors.Is(err, fs.ErrNotExist) {
		return "", ErrNoContext
	}
	if err != nil {
		return "", fmt.Errorf("find remembered context: %w", err)
	}
	file := strings.TrimSpace(string(data))
	if !filepath.IsAbs(file) {
		return "", fmt.Errorf("find remembered context: %s names no absolute path", note)
	}
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("the remembered context %s is gone: %w", file, ErrNoContext)
	}
	return file, nil
}

// Remember makes file the context of commands that name none.
func Remember(file string) error {
	note, err := rememberedFile()
	if err != nil {
		return err
	}
	abs, err := filepath.Abs(file)
	if err != nil {
		return fmt.Errorf("remember context: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(note), 0o700); err != nil {
		return fmt.Errorf("remember context: %w", err)
	}
	return durable.WriteFile(note, []byte(abs+"\n"), 0o600)
}

// Forget undoes [Remember] if file is the one remembered.
func Forget(file string) error {
	note, err := rememberedFile()
	if err != nil {
		return err
	}
	abs, err := filepath.Abs(file)
	if err != nil {
		return fmt.Errorf("forget context: %w", err)
	}
	data, err := os.ReadFile(note)
	if errors.Is(err, fs.ErrNotExist) || strings.TrimSpace(string(data)) != abs {
		return nil
	}
	if err != nil {
		return fmt.Errorf("forget context: %w", err)
	}
	return os.Remove(note)
}
