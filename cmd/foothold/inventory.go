package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"foothold/client/term"
	"foothold/internal/durable"
	"foothold/internal/signingkey"
	"foothold/internal/strictjson"
	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/inventory"
	"foothold/protocol/signed"
	"foothold/provider/enroll"

	"github.com/spf13/cobra"
)

func inventoryCommand() *cobra.Command {
	return contextFlag(group("inventory", "Publish the provider's hosts and keys, and take them into use",
		`The inventory lists the provider's hosts with the keys of their TPMs. The provider signs
each version of it off line and publishes its SHA-256; the tenant imports it, having
compared the digest over another way. A host that is not in it, or whose keys fail the
tenant's own checks, gets no VM.`,
		inventoryPublish(), inventoryImport(), inventoryShow(), inventoryList(), inventoryDiff(), inventoryAudit()))
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

func inventoryImport() *cobra.Command {
	var sum string
	c := jsonFlag(&cobra.Command{
		Use:   "import FILE [--sha256 DIGEST]",
		Short: "Take a version of the provider's inventory into use",
		Long: `Take a version of the provider's inventory into use. The orchestrator checks the provider's
signature, that the version is newer and has not expired, and each host's keys: that the
endorsement certificate chains to a pinned TPM manufacturer, that the attestation key
certified the session key, and, by a challenge to the host, that both lie in that TPM. A
document that fails is refused as a whole; a host that fails is kept with the reason, and
gets no VM. A host that is not in the new version, or has other keys, loses its good
standing at once.

Give the digest that the provider publishes over another way than you got the file. The
same version again has keys that were not validated tried again.`,
		Example: `  foothold inventory import inventory-000012.json --sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
  foothold inventory show            # what counts now, and what was found of each host`,
		Args: cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			doc, err := documentFile(args[0], sum)
			if err != nil {
				return err
			}
			out, err := s.ImportInventory(cmd.Context(), doc)
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), out)
			}
			for _, c := range out.Changes {
				s.log.Line("%-8s %s", c.What, term.Clean(c.Host))
			}
			if out.Before == out.Version {
				s.log.Line("version %d counted before", out.Version)
			}
			showAlerts(s.log, out.Alerts)
			showInventory(s.out, out.Inventory)
			return nil
		}),
	})
	c.Flags().StringVar(&sum, "sha256", "", "`DIGEST` that the provider published")
	return c
}

// documentFile is the request that takes a signed file into use.
func documentFile(file, sum string) (api.ImportDocument, error) {
	doc := api.ImportDocument{}
	data, err := readDocument(file)
	if err != nil {
		return doc, usage("%w", err)
	}
	if len(data) > api.MaxDocument {
		return doc, usage("%s: it has more than %d bytes", file, api.MaxDocument)
	}
	doc.Document = data
	if sum != "" {
		want, err := digest.Parse(sum)
		if err != nil {
			return doc, usage("--sha256: %w", err)
		}
		doc.SHA256 = &want
	}
	return doc, nil
}

func inventoryShow() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use:   "show [VERSION|FILE]",
		Short: "Show the inventory that counts, another version, or a file",
		Long: `Show the inventory that counts at the orchestrator with what was found of each host's keys,
or another imported version. A file is shown as it is: its signature is not checked.`,
		Example: "  foothold inventory show\n  foothold inventory show 11\n  foothold inventory show inventory-000012.json",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			what := "0"
			if len(args) > 0 {
				what = args[0]
			}
			inv, err := findInventory(cmd, what)
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), inv)
			}
			showInventory(term.New(cmd.OutOrStdout()), inv)
			return nil
		},
	})
}

// findInventory reads a version from the orchestrator, or a file.
func findInventory(cmd *cobra.Command, what string) (api.Inventory, error) {
	if version, err := strconv.Atoi(what); err == nil && version >= 0 {
		s, err := open(cmd)
		if err != nil {
			return api.Inventory{}, err
		}
		return s.Inventory(cmd.Context(), version)
	}
	data, err := readDocument(what)
	if err != nil {
		return api.Inventory{}, usage("%w", err)
	}
	var env signed.Envelope
	var doc inventory.Inventory
	if err = strictjson.Unmarshal(data, &env); err == nil {
		err = strictjson.Unmarshal(env.Payload, &doc)
	}
	if err != nil {
		return api.Inventory{}, usage("inventory %s: %w", what, err)
	}
	inv := api.Inventory{Version: doc.Version, SHA256: digest.Of(env.Payload), Provider: doc.Provider, Issued: doc.Issued, Expires: doc.Expires, HostCount: len(doc.Hosts)}
	for _, h := range doc.Hosts {
		inv.Hosts = append(inv.Hosts, api.HostEntry{Name: h.Name, API: h.API, Location: h.Location, Asset: h.Asset, Software: h.Software,
			EK: digest.Of(h.EK), AIK: digest.Of(h.AIK), Session: digest.Of(h.Session)})
	}
	return inv, nil
}

func showInventory(out *term.Out, inv api.Inventory) {
	imported := ""
	if !inv.Imported.IsZero() {
		imported = fmt.Sprintf("%s by %s", when(inv.Imported), term.Clean(inv.ImportedBy))
	}
	out.Fields(
		term.Field{Name: "version", Value: itoa(inv.Version)},
		term.Field{Name: "sha256", Value: inv.SHA256.String()},
		term.Field{Name: "provider", Value: term.Clean(inv.Provider)},
		term.Field{Name: "expires", Value: fmt.Sprintf("%s (%s)", inv.Expires.UTC().Format(time.RFC3339), fromNow(inv.Expires))},
		term.Field{Name: "imported", Value: imported},
	)
	out.Line("")
	var rows [][]string
	for _, h := range inv.Hosts {
		tone := term.Good
		if h.Keys != api.KeysValidated {
			tone = term.Bad
		}
		rows = append(rows, []string{term.Clean(h.Name), out.Paint(tone, h.Keys), h.API.String(), term.Clean(h.Location), term.Clean(h.Asset), term.Clean(h.Software), h.AIK.Short(), term.Clean(h.Reason)})
	}
	out.Table([]string{"host", "keys", "api", "location", "asset", "software", "aik", ""}, rows)
}

// showAlerts lists the running VMs that a document or an audit left without what they rested on.
func showAlerts(out *term.Out, alerts []api.Alert) {
	for _, a := range alerts {
		out.Line("%s", out.Paint(term.Bad, fmt.Sprintf("VM %s on host %s: %s: %s (%s)", term.Clean(a.VM), term.Clean(a.Host), a.Reason, term.Clean(a.Detail), a.Action)))
	}
}

func inventoryList() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the imported versions of the inventory",
		Example: "  foothold inventory list",
		Args:    cobra.NoArgs,
		RunE: inSession(func(cmd *cobra.Command, _ []string, s *session) error {
			list, err := s.Inventories(cmd.Context())
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), orEmpty(list))
			}
			var rows [][]string
			for _, v := range list {
				note := ""
				if v.Current {
					note = "counts"
				}
				rows = append(rows, []string{itoa(v.Version), v.SHA256.String(), itoa(v.HostCount), when(v.Expires), when(v.Imported), term.Clean(v.ImportedBy), note})
			}
			s.out.Table([]string{"version", "sha256", "hosts", "expires", "imported", "by", ""}, rows)
			return nil
		}),
	})
}

func inventoryDiff() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use:   "diff OLD NEW",
		Short: "Say in which hosts two versions of the inventory differ",
		Long: `Say in which hosts two versions differ: versions that were imported, 0 for the one that
counts, or files. The exit code is 1 if they differ, so that a script can tell. Look at
this before you import.`,
		Example: "  foothold inventory diff 0 inventory-000012.json\n  foothold inventory diff 10 11",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			before, err := findInventory(cmd, args[0])
			if err != nil {
				return err
			}
			after, err := findInventory(cmd, args[1])
			if err != nil {
				return err
			}
			changes := orEmpty(diffHosts(before.Hosts, after.Hosts))
			if wantsJSON(cmd) {
				err = printJSON(cmd.OutOrStdout(), changes)
			} else {
				showHostDiff(term.New(cmd.OutOrStdout()), changes)
			}
			if err == nil && len(changes) > 0 {
				err = fmt.Errorf("%s", plural(len(changes), "host differs", "hosts differ"))
			}
			return err
		},
	})
}

// hostDiff is one host in which two versions differ, with each fact that does.
type hostDiff struct {
	Host  string   `json:"host"`
	What  string   `json:"what"` // "new", "gone" or "changed"
	Facts []string `json:"facts"`
}

func diffHosts(before, after []api.HostEntry) []hostDiff {
	was := map[string]api.HostEntry{}
	for _, h := range before {
		was[h.Name] = h
	}
	var list []hostDiff
	for _, h := range after {
		old, ok := was[h.Name]
		delete(was, h.Name)
		if !ok {
			list = append(list, hostDiff{h.Name, "new", []string{}})
			continue
		}
		facts := []string{}
		for _, f := range [][3]string{{"endorsement certificate", old.EK.String(), h.EK.String()}, {"attestation key", old.AIK.String(), h.AIK.String()},
			{"session key", old.Session.String(), h.Session.String()}, {"address", old.API.String(), h.API.String()}, {"release", old.Software, h.Software},
			{"location", old.Location, h.Location}, {"asset tag", old.Asset, h.Asset}} {
			if f[1] != f[2] {
				facts = append(facts, fmt.Sprintf("%s: was %s, is %s", f[0], f[1], f[2]))
			}
		}
		if len(facts) > 0 {
			list = append(list, hostDiff{h.Name, "changed", facts})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(was)) {
		list = append(list, hostDiff{name, "gone", []string{}})
	}
	return list
}

func showHostDiff(out *term.Out, changes []hostDiff) {
	for _, c := range changes {
		out.Line("%-8s %s", c.What, term.Clean(c.Host))
		for _, f := range c.Facts {
			out.Line("           %s", term.Clean(f))
		}
	}
	if len(changes) == 0 {
		out.Line("no host differs")
	}
}
