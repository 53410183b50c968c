package main

import (
	"time"

	"foothold/client/term"
	"foothold/internal/durable"
	"foothold/internal/signingkey"
	"foothold/protocol/digest"
	"foothold/protocol/inventory"
	"foothold/provider/enroll"

	"github.com/spf13/cobra"
)

func inventoryCommand() *cobra.Command {
	return contextFlag(group("inventory", "Publish the provider's hosts and keys, and take them into use",
		`The inventory lists the provider's hosts with the keys of their TPMs. The provider signs
each version of it off line and publishes its SHA-256; the tenant imports it, having
compared the digest over another way. A host that is not in it, or whose keys fail the
tenant's own checks, gets no VM.`,
		inventoryPublish()))
}

// published is what `inventory publish --json` prints.
type published struct {
	Version int             `json:"version"`
	SHA256  digest.SHA256   `json:"sha256"`
	Issued  time.Time       `json:"issued"`
	Expires time.Time       `json:"expires"`
	Hosts   int             `json:"hosts"`
	File    string          `json:"file"`
	Fresh   bool            `json:"fresh"` // false: it was published before
	Changes []enroll.Change `json:"changes"`
}

func inventoryPublish() *cobra.Command {
	var provider, key, dir, out string
	var valid time.Duration
	c := jsonFlag(&cobra.Command{
		Use:   "publish --provider NAME --key FILE --dir FOLDER HOST.json...",
		Short: "Sign the next version of the inventory (the provider's command)",
		Long: `Sign the next version of the inventory, from every host's entry as foothold-host enroll made
it on that host: a host whose entry is left out is struck out. The folder keeps every
version. The version is one more than the newest there; if the hosts are the same and at
least half of its time is left, the newest stays.

Print the SHA-256 where tenants can compare it over another way than they get the file.
The key stays off line. Put --out where the hosts' agents serve it from.`,
		Example: `  foothold inventory publish --provider hall --key inventory.key --dir published alpha.json beta.json
  foothold inventory publish --provider hall --key inventory.key --dir published --out inventory.json alpha.json`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if provider == "" || key == "" || dir == "" || valid <= 0 {
				return usage("want --provider, --key, --dir and a positive --valid-for")
			}
			private, err := signingkey.Read(key)
			if err != nil {
				return usage("%w", err)
			}
			hosts := make([]inventory.Host, len(args))
			for i, file := range args {
				if hosts[i], err = enroll.ReadEntry(file); err != nil {
					return usage("%w", err)
				}
			}
			v, changes, fresh, err := enroll.PublishNext(cmd.Context(), dir, private, provider, time.Now(), valid, hosts)
			if err != nil {
				return err
			}
			if out != "" {
				if err := durable.WriteFile(out, v.Signed, 0o644); err != nil {
					return err
				}
			}
			return showPublished(cmd, published{v.Version, v.Digest, v.Issued, v.Expires, len(v.Hosts), v.File, fresh, orEmpty(changes)})
		},
	})
	c.Flags().StringVar(&provider, "provider", "", "provider's `NAME`")
	c.Flags().StringVar(&key, "key", "", "`FILE` of the inventory key, Ed25519, PKCS #8 in PEM, readable by its owner alone")
	c.Flags().StringVar(&dir, "dir", "", "`FOLDER` that keeps every version")
	c.Flags().StringVar(&out, "out", "", "`FILE` that also gets the newest version")
	c.Flags().DurationVar(&valid, "valid-for", 30*24*time.Hour, "how long it counts")
	return c
}

func showPublished(cmd *cobra.Command, p published) error {
	if wantsJSON(cmd) {
		return printJSON(cmd.OutOrStdout(), p)
	}
	log := term.New(cmd.ErrOrStderr())
	for _, c := range p.Changes {
		log.Line("%-8s %s", c.What, c.Host)
	}
	if !p.Fresh {
		log.Line("nothing has changed; version %d stays", p.Version)
	}
	term.New(cmd.OutOrStdout()).Fields(
		term.Field{Name: "version", Value: itoa(p.Version)},
		term.Field{Name: "sha256", Value: p.SHA256.String()},
		term.Field{Name: "hosts", Value: itoa(p.Hosts)},
		term.Field{Name: "expires", Value: p.Expires.Format(time.RFC3339)},
		term.Field{Name: "file", Value: p.File},
	)
	return nil
}
