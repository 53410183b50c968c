package template

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"foothold/protocol/audit"
	"foothold/protocol/digest"
)

//go:embed facts.sh
var factsScript string

// facts is what an OS image holds, as facts.sh says it. Paths have no leading slash.
type facts struct {
	files       []fileFact
	targets     map[string]string // symbolic link → target
	sums        map[string]digest.SHA256
	users       []audit.User
	passwords   map[string]string // user → password field of /etc/shadow
	privateKeys []string
	machineID   bool // /etc/machine-id is not empty
	packages    []Package
}

type fileFact struct {
	kind     byte // find's %y: f d l b c p s
	mode     uint32
	uid, gid int
	path     string
}

// readFacts extracts an image into the folder tree, which it leaves to the caller to
// remove, and reads what is there.
func readFacts(ctx context.Context, image, tree string) (*facts, error) {
	var out bytes.Buffer
	if err := inNamespace(ctx, factsScript, &out, image, tree); err != nil {
		return nil, fmt.Errorf("read what the image holds: %w", err)
	}
	return parseFacts(out.Bytes())
}

func parseFacts(text []byte) (*facts, error) {
	f := &facts{targets: map[string]string{}, sums: map[string]digest.SHA256{}, passwords: map[string]string{}}
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, 1<<20)
	var link string
	for lines.Scan() {
		kind, rest, _ := strings.Cut(lines.Text(), " ")
		var err error
		switch kind {
		case "file":
			err = f.addFile(rest)
		case "link":
			link = rest
		case "target":
			f.targets[link] = rest
		case "sum":
			sum, name, _ := strings.Cut(rest, " ")
			f.sums[name], err = digest.Parse(sum)
		case "passwd":
			err = f.addUser(rest)
		case "shadow":
			user, password, _ := strings.Cut(rest, ":")
			f.passwords[user] = password
		case "privatekey":
			f.privateKeys = append(f.privateKeys, rest)
		case "machineid":
			f.machineID = true
		case "package":
			f.packages = append(f.packages, Package{Name: rest})
		case "status", "version":
			err = f.addToPackage(kind, rest)
		default:
			err = fmt.Errorf("unknown fact %q", kind)
		}
		if err != nil {
			return nil, fmt.Errorf("read what the image holds: %w", err)
		}
	}
	for i := range f.users {
		f.users[i].Locked = lockedPassword(f.passwords[f.users[i].Name])
	}
	f.packages = slices.DeleteFunc(f.packages, func(p Package) bool { return p.Version == absent })
	slices.SortFunc(f.packages, func(a, b Package) int { return strings.Compare(a.Name, b.Name) })
	return f, lines.Err()
}

func (f *facts) addFile(text string) error {
	words := strings.SplitN(text, " ", 5)
	if len(words) != 5 || len(words[0]) != 1 {
		return fmt.Errorf("malformed file fact %q", text)
	}
	mode, err := strconv.ParseUint(words[1], 8, 32)
	if err != nil {
		return fmt.Errorf("malformed mode %q", words[1])
	}
	uid, err := strconv.Atoi(words[2])
	if err != nil {
		return fmt.Errorf("malformed owner %q", words[2])
	}
	gid, err := strconv.Atoi(words[3])
	if err != nil {
		return fmt.Errorf("malformed group %q", words[3])
	}
	f.files = append(f.files, fileFact{kind: words[0][0], mode: uint32(mode), uid: uid, gid: gid, path: words[4]})
	return nil
}

func (f *facts) addUser(line string) error {
	fields := strings.Split(line, ":")
	if len(fields) != 7 {
		return fmt.Errorf("malformed line %q of /etc/passwd", line)
	}
	uid, err := strconv.Atoi(fields[2])
	if err != nil {
		return fmt.Errorf("malformed user id %q", fields[2])
	}
	f.users = append(f.users, audit.User{Name: fields[0], UID: uid, Shell: fields[6]})
	if fields[1] != "x" { // a password here would pass by /etc/shadow
		f.passwords[fields[0]+" (passwd)"] = fields[1]
	}
	return nil
}

// absent stands as the version of a package that is known but not installed.
const absent = "absent"

// addToPackage completes the package named last.
func (f *facts) addToPackage(kind, value string) error {
	if len(f.packages) == 0 {
		return fmt.Errorf("a %s without its package", kind)
	}
	p := &f.packages[len(f.packages)-1]
	switch {
	case kind == "version" && p.Version != absent:
		p.Version = value
	case kind == "status" && value != "install ok installed":
		p.Version = absent
	}
	return nil
}

func lockedPassword(field string) bool {
	return strings.HasPrefix(field, "!") || strings.HasPrefix(field, "*")
}

// enabledUnits lists the links that make systemd start a unit, apart from those whose
// unit is masked.
func (f *facts) enabledUnits() []string {
	var units []string
	for link := range f.targets {
		dir, name := path.Split(link)
		dir = strings.TrimSuffix(dir, "/")
		wants := strings.HasSuffix(dir, ".wants") || strings.HasSuffix(dir, ".requires")
		if !wants || !strings.Contains(dir, "/systemd/system/") || f.targets["etc/systemd/system/"+name] == "/dev/null" {
			continue
		}
		units = append(units, strings.TrimSuffix(path.Base(dir), path.Ext(dir))+" → "+name)
	}
	slices.Sort(units)
	return slices.Compact(units)
}

// contents is the part that is kept in the record.
func (f *facts) contents() Contents {
	c := Contents{Packages: f.packages, Users: f.users, Units: f.enabledUnits()}
	for _, file := range f.files {
		if sum, ok := f.sums[file.path]; ok {
			c.Programs = append(c.Programs, audit.File{Path: "/" + file.path, Mode: 0o100000 | file.mode, SHA256: sum})
		}
	}
	slices.SortFunc(c.Users, func(a, b audit.User) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(c.Programs, func(a, b audit.File) int { return strings.Compare(a.Path, b.Path) })
	return c
}
