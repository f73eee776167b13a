# What a Vagrantfile would make, as JSON: it is evaluated as Vagrant does, with objects that only remember what they are
# told.
#
#     ruby tests/unit/vagrantfile.rb vagrant/Vagrantfile

require "json"

module Vagrant
  module Util
    module Platform
      def self.windows?
        ENV["TEST_WINDOWS"] == "1"
      end
    end
  end

  # Remembers `x.name = value` as a value, `x.name(arguments) { |y| … }` as calls of that name, `x.name` as an object.
  class Told
    attr_reader :told

    def initialize
      @told = {}
    end

    def respond_to_missing?(*)
      true
    end

    def method_missing(name, *arguments, **options, &block)
      return @told[name.to_s.chomp("=")] = arguments.first if name.end_with?("=")
      return @told[name] ||= Told.new if arguments.empty? && options.empty? && !block

      inner = Told.new
      block&.call(inner)
      (@told["#{name}()"] ||= []) << { arguments: arguments, options: options, told: inner }
    end

    def to_json(*state)
      @told.to_json(*state)
    end
  end

  def self.configure(_version)
    yield(config = Told.new)
    puts JSON.generate(config)
  end
end

load ARGV.first
