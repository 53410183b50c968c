package template

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"foothold/internal/command"
	"foothold/internal/durable"
	"foothold/internal/luks"
	"foothold/protocol/digest"
)

// verity is how a sealed image is checked.
type verity struct {
	root, salt digest.SHA256
	offset     int64 // bytes
}

// seal appends a dm-verity superblock and hash tree to an image. The salt is the
// image's own digest, so that the same image is always sealed the same.
func seal(ctx context.Context, path string) (verity, error) {
	salt, err := durable.Digest(path)
	if err != nil {
		return verity{}, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return verity{}, fmt.Errorf("seal image: %w", err)
	}
	v := verity{salt: salt, offset: roundUp(info.Size())}
	if err := os.Truncate(path, v.offset); err != nil {
		return verity{}, fmt.Errorf("seal image: %w", err)
	}
	out, err := command.Output(ctx, "veritysetup", "format", "--hash=sha256", "--data-block-size=4096", "--hash-block-size=4096",
		"--salt="+salt.String(), "--uuid="+uuidOf(salt.String()), "--data-blocks="+strconv.FormatInt(v.offset/luks.SectorSize, 10),
		"--hash-offset="+strconv.FormatInt(v.offset, 10), path, path)
	if err != nil {
		return verity{}, fmt.Errorf("seal image: %w", err)
	}
	for _, line := range strings.Split(string(out), "\n") {
		if text, ok := strings.CutPrefix(line, "Root hash:"); ok {
			if v.root, err = digest.Parse(strings.TrimSpace(text)); err != nil {
				return verity{}, fmt.Errorf("seal image: read root hash: %w", err)
			}
		}
	}
	if v.root.IsZero() {
		return verity{}, fmt.Errorf("seal image: veritysetup names no root hash")
	}
	if info, err = os.Stat(path); err != nil {
		return verity{}, fmt.Errorf("seal image: %w", err)
	}
	if err := os.Truncate(path, roundUp(info.Size())); err != nil {
		return verity{}, fmt.Errorf("seal image: %w", err)
	}
	return v, nil
}

// check verifies every block of a plain image against the root hash.
func (v verity) check(ctx context.Context, path string) error {
	return command.Run(ctx, "veritysetup", "verify", "--hash-offset="+strconv.FormatInt(v.offset, 10), path, path, v.root.String())
}

func roundUp(size int64) int64 {
	return (size + luks.SectorSize - 1) / luks.SectorSize * luks.SectorSize
}

// uuidOf makes a UUID of the first half of a hexadecimal digest (RFC 9562, version 8).
func uuidOf(hex string) string {
	return hex[:8] + "-" + hex[8:12] + "-8" + hex[13:16] + "-8" + hex[17:20] + "-" + hex[20:32]
}

// inNamespace runs a shell script as mapped root, with a range of further ids, in a
// user and mount namespace of its own. Arguments follow the script as $1 and on.
func inNamespace(ctx context.Context, script string, out io.Writer, args ...string) error {
	cmd, err := command.New(ctx, "unshare", append([]string{"--map-root-user", "--map-auto", "--mount", "--fork", "--kill-child",
		"sh", "-s"}, args...)...)
	if err != nil {
		return err
	}
	cmd.Env = append(cmd.Env, "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TZ=UTC")
	cmd.Stdin = strings.NewReader(script)
	cmd.Stdout = out
	_, err = command.Wait(cmd)
	return err
}

// removeTree removes a work folder, in which other users of the namespace own files.
// It runs even when the build's context has ended.
func removeTree(dir string) {
	if os.RemoveAll(dir) != nil {
		inNamespace(context.Background(), `rm -rf -- "$1"`, nil, dir)
	}
}
