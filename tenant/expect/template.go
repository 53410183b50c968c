package expect

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"strings"

	"foothold/internal/strictjson"
	"foothold/protocol/digest"
)

// MaxTemplate bounds a template's expectations in bytes of JSON.
const MaxTemplate = 4 << 20

// Template is what every VM of a template looks like when it runs as it should. The
// template's build writes it, api.RegisterTemplate carries it (field Audit), the
// orchestrator keeps it. What differs from start to start is in [Instance].
type Template struct {
	Kernel    string        `json:"kernel"`    // uname -r
	Taint     uint64        `json:"taint"`     // kernel taint bits that may be set; 0: none
	Agent     digest.SHA256 `json:"agent"`     // the static agent: /init of the guest image, resident later
	Modules   []string      `json:"modules"`   // kernel modules that may be loaded, at either stage, as /proc/modules writes them
	Initramfs Stage         `json:"initramfs"` //
	OS        Stage         `json:"os"`        //
	// AuthenticatedVolume is the template's policy for its VMs' own volumes: a tag beside
	// each sector (dm-integrity), or encryption alone.
	AuthenticatedVolume bool `json:"authenticated_volume"`
}

// Stage is what may be there at one stage, beyond what package expect always demands:
// the agent, the disks, root on the verity device, the network.
type Stage struct {
	Programs []Program `json:"programs"` // that may run as processes
	Mounts   []Mount   `json:"mounts"`   // that may be mounted
	Users    []User    `json:"users"`    // that must be there, no more and no fewer
	Files    []File    `json:"files"`    // that the report may list: initramfs, all in memory; os, the writable overlay
}

// Program is an executable of the template.
type Program struct {
	Path   string        `json:"path"` // as /proc/PID/exe shows it
	SHA256 digest.SHA256 `json:"sha256"`
}

// Sources of mounts that stand for this start's devices.
const (
	SourceRoot   = "@root"   // the verity device of the template
	SourceVolume = "@volume" // the decrypted volume
)

// Mount is a mount point. Source and Target are patterns of path.Match; the source "*"
// is any name that is not a device.
type Mount struct {
	Source  string   `json:"source"`
	Target  string   `json:"target"`
	Type    string   `json:"type"`
	Options []string `json:"options,omitempty"` // that must be among the mount's: "ro", "nosuid"
}

// User is an account of the template; each must be locked.
type User struct {
	Name  string `json:"name"`
	UID   int    `json:"uid"`
	Shell string `json:"shell"`
}

// File is a file that may be there; the digest of a symbolic link is its target's.
// Without a digest the content is the instance's own; then it must be a regular file
// that is not executable.
type File struct {
	Path   string        `json:"path"` // pattern of path.Match
	SHA256 digest.SHA256 `json:"sha256"`
}

// Parse decodes and checks a template's expectations.
func Parse(data []byte) (Template, error) {
	var t Template
	if len(data) > MaxTemplate {
		return t, fmt.Errorf("template expectations: %w", strictjson.ErrTooLarge)
	}
	if err := strictjson.Unmarshal(data, &t); err != nil {
		return t, fmt.Errorf("template expectations: %w", err)
	}
	return t, t.Validate()
}

// Encode is the inverse of Parse.
func (t Template) Encode() ([]byte, error) {
	if err := t.Validate(); err != nil {
		return nil, err
	}
	return json.Marshal(t)
}

// Validate refuses expectations that would let anything pass.
func (t Template) Validate() error {
	if t.Kernel == "" {
		return errors.New("template expectations: no kernel version")
	}
	if t.Agent.IsZero() {
		return errors.New("template expectations: no digest of the agent")
	}
	for _, s := range []Stage{t.Initramfs, t.OS} {
		if err := s.validate(); err != nil {
			return fmt.Errorf("template expectations: %w", err)
		}
	}
	return nil
}

func (s Stage) validate() error {
	for _, p := range s.Programs {
		if !strings.HasPrefix(p.Path, "/") || p.SHA256.IsZero() {
			return fmt.Errorf("program %q needs an absolute path and a digest", p.Path)
		}
	}
	for _, m := range s.Mounts {
		if m.Type == "" || m.Source == "" || !strings.HasPrefix(m.Target, "/") {
			return fmt.Errorf("mount %q needs source, target and type", m.Target)
		}
		if err := patterns(m.Source, m.Target); err != nil {
			return err
		}
	}
	for _, f := range s.Files {
		if !strings.HasPrefix(f.Path, "/") {
			return fmt.Errorf("file %q needs an absolute path", f.Path)
		}
		if err := patterns(f.Path); err != nil {
			return err
		}
	}
	for _, u := range s.Users {
		if u.Name == "" || u.UID < 0 {
			return errors.New("user without name")
		}
	}
	return nil
}

func patterns(list ...string) error {
	for _, p := range list {
		if _, err := path.Match(p, ""); err != nil {
			return fmt.Errorf("pattern %q: %w", p, err)
		}
	}
	return nil
}
